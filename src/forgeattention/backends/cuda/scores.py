"""Scores of packed keys and sums of packed values: launches of kernels/cuda on torch tensors."""

from __future__ import annotations

from typing import Any

import torch

from ...codec.codec import Codec
from ...codec.spec import PAGE
from ...ops.arrays import dtype_of
from ...ops.table import PageTable
from . import nvrtc, params, plans
from .launch import constants_of, current_stream, limits, on_device, table_members


class _Launch:
    """What the launches of qk_scores or value_sum for one codec, number of queries and dtype have in common."""

    def __init__(self, stem: str, codec: Codec, heads: int, n: int, dtype: str, device: Any) -> None:
        constants, side = constants_of(codec, device), int(stem == "value_sum")
        group = heads // codec.kv_heads
        shared = plans.value_sum_shared_bytes(codec.format) if side else 0
        self.kernel = nvrtc.kernel(stem, plans.scores_macros(codec, dtype), device.index, shared)
        self.warps = plans.scores_warps(codec.format)
        self.across = codec.kv_heads * -(-group * n // 8)
        self.pack = params.SCORES.packer(
            transform=constants.attend[side],
            kv_heads=codec.kv_heads,
            group=group,
            n=n,
            queries=group * n,
            query_tiles=-(-group * n // 8),
            unit=constants.units[side],
        )

    def run(self, x: Any, table: PageTable, out: Any, scale: float, splits: int) -> None:
        """With `splits` CTAs across the pages."""
        packed = self.pack(
            q=x.data_ptr(),
            out=out.data_ptr(),
            q_stride=x.stride()[:3],
            **table_members(table),
            max_length=table.max_length,
            scale=scale,
        )
        self.kernel.launch((splits, self.across, x.shape[0]), 32 * self.warps, current_stream(x.device), packed)


def _launch(stem: str, codec: Codec, x: Any) -> _Launch:
    _, heads, n, _ = x.shape
    constants = constants_of(codec, x.device)
    key = stem, heads, n, x.dtype
    return constants.launch(key, lambda: _Launch(stem, codec, heads, n, dtype_of(x), x.device))


def qk_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty((*q.shape[:3], table.max_length), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out
    with on_device(q.device):
        launch = _launch("qk_scores", codec, q)
        pages, across = -(-table.max_length // PAGE), launch.across * q.shape[0]
        splits = min(-(-pages // launch.warps), max(1, 8 * limits(q.device.index).processors // across))
        launch.run(q, table, out, scale, splits)
    return out


def value_sum(p: Any, codec: Codec, table: PageTable) -> Any:
    """Weights that are not finite give an undefined result here: finding them would wait for the device."""
    p = p.contiguous()
    if p.shape[0] == 0 or p.shape[2] == 0 or table.max_length == 0:
        return torch.zeros((*p.shape[:3], codec.head_dim), dtype=torch.float32, device=p.device)
    with on_device(p.device):
        launch = _launch("value_sum", codec, p)
        # By max_length alone, so that a row's result ignores the batch.
        splits = max(1, min(64, -(-table.max_length // PAGE) // (2 * launch.warps)))
        out = torch.empty((splits, *p.shape[:3], codec.head_dim), dtype=torch.float32, device=p.device)
        launch.run(p, table, out, 1.0, splits)
        return out.sum(0)
