"""Scores of packed keys and sums of packed values: launches of kernels/cuda on torch tensors."""

from __future__ import annotations

from typing import Any

import torch

from ...codec.codec import Codec
from ...codec.spec import PAGE
from ...ops.arrays import dtype_of
from ...ops.table import PageTable
from . import params as args
from . import plans
from .launch import address, constants_of, current_stream, limits, on_device

_scores_params = args.Packer(args.ScoresParams)


def _launch_scores(stem: str, codec: Codec, table: PageTable, x: Any, out: Any, scale: float, groups: int) -> None:
    """A launch of qk_scores or value_sum with `groups` CTAs across the pages."""
    side = int(stem == "value_sum")
    constants = constants_of(codec, x.device)
    shared = plans.value_sum_shared_bytes(codec.format) if side else 0
    kernel = constants.kernel((stem, x.dtype), lambda: (plans.scores_macros(codec, dtype_of(x)), shared))
    group, n = x.shape[1] // codec.kv_heads, x.shape[2]
    blocks = -(-group * n // 8)
    params = _scores_params(
        *map(address, (x, table.base, table.offsets, table.lengths, out)),
        bytes(constants.attend[side]),
        *x.stride()[:3],
        table.offsets.stride(0),
        *(codec.kv_heads, group, n, group * n, blocks, table.max_length),
        scale,
        (codec.v_codebook if side else codec.k_codebook).unit,
    )
    grid = (groups, codec.kv_heads * blocks, x.shape[0])
    kernel.launch(grid, 32 * plans.scores_warps(codec.format), current_stream(x.device), params)


def qk_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty((*q.shape[:3], table.max_length), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out
    with on_device(q.device):
        pages, warps = -(-table.max_length // PAGE), plans.scores_warps(codec.format)
        group = q.shape[1] // codec.kv_heads
        across = codec.kv_heads * -(-group * q.shape[2] // 8) * q.shape[0]
        groups = min(-(-pages // warps), max(1, 8 * limits(q.device.index).processors // across))
        _launch_scores("qk_scores", codec, table, q, out, scale, groups)
    return out


def value_sum(p: Any, codec: Codec, table: PageTable) -> Any:
    """Weights that are not finite give an undefined result here: finding them would wait for the device."""
    p = p.contiguous()
    if p.shape[0] == 0 or p.shape[2] == 0 or table.max_length == 0:
        return torch.zeros((*p.shape[:3], codec.head_dim), dtype=torch.float32, device=p.device)
    with on_device(p.device):
        pages = -(-table.max_length // PAGE)
        # By max_length alone, so that a row's result ignores the batch.
        splits = max(1, min(64, pages // (2 * plans.scores_warps(codec.format))))
        out = torch.empty((splits, *p.shape[:3], codec.head_dim), dtype=torch.float32, device=p.device)
        _launch_scores("value_sum", codec, table, p, out, 1.0, splits)
        return out.sum(0)
