"""Attention over packed and exact tokens, and its merge: launches of kernels/cuda on torch tensors."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...codec.codec import Codec
from ...ops.arrays import dtype_of
from ...ops.table import ExactTokens, PageTable
from ..merge import merge_in
from . import nvrtc, plans
from . import params as args
from .launch import (
    Constants,
    address,
    aligned_rows,
    constants_of,
    counters,
    current_stream,
    limits,
    on_device,
    partials,
)

LOG2E = math.log2(math.e)
_merge_params = args.Packer(args.MergeParams)
decode_params = args.Packer(args.DecodeParams)
_NONE = (0, 0, 0)


def merge(o1: Any, lse1: Any, o2: Any, lse2: Any) -> tuple[Any, Any]:
    """One launch where o1 is [batch, heads, n, an even head_dim] and the rest float32, as prefill has it; else torch's
    operations."""
    pairs = o1.ndim == 4 and o1.shape[3] % 2 == 0 and o1.dtype.itemsize <= 4
    if not (pairs and o2.dtype == lse1.dtype == lse2.dtype == torch.float32):
        return merge_in(torch, o1, lse1, o2, lse2)
    o1, lse1, o2, lse2 = o1 if o1.stride(-1) == 1 else o1.contiguous(), *(x.contiguous() for x in (lse1, o2, lse2))
    out = torch.empty(o1.shape, dtype=o1.dtype, device=o1.device)
    lse = torch.empty_like(lse1)
    if out.numel() == 0:
        return out, lse
    with on_device(o1.device):
        kernel = nvrtc.kernel("merge", args.merge_macros(o1.shape[3], dtype_of(o1)), o1.device.index, 0)
        rows = lse1.numel()
        params = _merge_params(
            *map(address, (o1, lse1, o2, lse2, out, lse)), *o1.stride()[:3], rows, o1.shape[1], o1.shape[2]
        )
        kernel.launch((-(-rows // 8), 1, 1), 256, current_stream(o1.device), params)
    return out, lse


class DecodeLaunch:
    """What the launches for one codec, number of queries and pair of dtypes have in common."""

    def __init__(
        self,
        codec: Codec,
        constants: Constants,
        group: int,
        n: int,
        dtypes: tuple[str, str],
        device: int,
        exact_block: int = 0,
    ) -> None:
        self.plan = plans.decode_plan(codec.format, codec.kv_heads, group * n, limits(device))
        macros = self.plan.macros(codec, *dtypes, exact_block)
        self.kernel = nvrtc.kernel("decode_attention", macros, device, self.plan.shared_bytes)
        self.threads = 32 * self.plan.warps
        self.width = codec.format.padded_dim
        self.transforms = tuple(map(bytes, constants.attend))
        self.queries = codec.kv_heads, group, n, group * n, self.plan.blocks
        self.cut = self.plan.chunks, self.plan.min_pages
        self.units = codec.k_codebook.unit, codec.v_codebook.unit


def decode_attention(
    q: Any,
    codec: Codec,
    table: PageTable | None,
    exact: ExactTokens | None,
    scale: float,
    causal: bool,
    sink_logits: Any | None,
) -> tuple[Any, Any]:
    batch, q_heads, n, _ = q.shape
    device, kv_heads = q.device, codec.kv_heads
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((batch, q_heads, n), dtype=torch.float32, device=device)
    if out.numel() == 0:
        return out, lse
    exact_k, exact_v = (q, q) if exact is None else (aligned_rows(exact.k), aligned_rows(exact.v))
    with on_device(device):
        constants = constants_of(codec, device)
        key = ("decode_attention", q_heads, n, q.dtype, exact_k.dtype)
        launch = constants.kernels.get(key)
        if launch is None:
            dtypes = dtype_of(q), dtype_of(exact_k)
            launch = DecodeLaunch(codec, constants, q_heads // kv_heads, n, dtypes, device.index)
            constants.kernels[key] = launch
        stream = current_stream(device)
        heads = batch * kv_heads * launch.plan.blocks
        max_length = 0 if table is None else table.max_length
        slots = launch.plan.slots(max_length, 0 if exact is None else exact.max_length)
        parts = heads * slots * launch.plan.queries  # a vector, its maximum and its sum each
        part = partials(device, stream, parts * (launch.width + 2))
        params = decode_params(
            q.data_ptr(),
            *(_NONE if table is None else map(address, (table.base, table.offsets, table.lengths))),
            *(_NONE if exact is None else (exact_k.data_ptr(), exact_v.data_ptr(), exact.lengths.data_ptr())),
            0,
            0 if sink_logits is None else sink_logits.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
            part,
            part + 4 * parts * launch.width,
            counters(device, stream, heads),
            *launch.transforms,
            *q.stride()[:3],
            *exact_k.stride()[:3],
            *exact_v.stride()[:3],
            *out.stride()[:3],
            0 if table is None else table.offsets.stride(0),
            0,
            *launch.queries,
            causal,
            *launch.cut,
            slots,
            max_length,
            scale * LOG2E,
            *launch.units,
        )
        launch.kernel.launch(launch.plan.grid(batch, kv_heads, max_length), launch.threads, stream, params)
    return out, lse
