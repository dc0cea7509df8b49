"""Attention over packed and exact tokens, and its merge: launches of kernels/cuda on torch tensors."""

from __future__ import annotations

import ctypes
import math
import struct
import threading
from functools import cache
from typing import Any

import torch

from ...codec.codec import Codec
from ...ops.arrays import dtype_name, dtype_of
from ...ops.table import ExactTokens, PageTable
from ..merge import merge_in
from . import nvrtc, params, plans
from .launch import (
    Constants,
    aligned_rows,
    constants_of,
    counters,
    current_device,
    current_stream,
    limits,
    on_device,
    partials,
    scratch_age,
    table_members,
)
from .macros import merge_macros

LOG2E = math.log2(math.e)
_pack_merge = params.MERGE.packer()


@cache
def _merge_kernel(dim: int, dtype: Any, device: int) -> nvrtc.Kernel:
    return nvrtc.kernel("merge", merge_macros(dim, dtype_name(dtype)), device, 0)


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
        rows = lse1.numel()
        packed = _pack_merge(
            a=o1.data_ptr(),
            a_lse=lse1.data_ptr(),
            b=o2.data_ptr(),
            b_lse=lse2.data_ptr(),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            a_stride=o1.stride()[:3],
            rows=rows,
            heads=o1.shape[1],
            n=o1.shape[2],
        )
        kernel = _merge_kernel(o1.shape[3], o1.dtype, o1.device.index)
        kernel.launch((-(-rows // 8), 1, 1), 256, current_stream(o1.device), packed)
    return out, lse


class DecodeLaunch:
    """What the launches for one codec, number of queries and pair of dtypes have in common.

    Args:
        codec: the layer's codec.
        constants: of the codec on the device.
        group: query heads of a KV head.
        n: queries of a head.
        dtypes: of queries and of exact tokens.
        device: number of the device.
        exact_block: tokens of a block of exact tokens; 0 where a row's lie side by side.
    """

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
        self.plan = plan = plans.decode_plan(codec.format, codec.kv_heads, group * n, limits(device))
        macros = plan.macros(codec, *dtypes, exact_block)
        self.kernel = nvrtc.kernel("decode_attention", macros, device, plan.shared_bytes)
        self.threads = 32 * plan.warps
        self.width, self.kv_heads = codec.format.padded_dim, codec.kv_heads
        own = {} if exact_block else {"exact_blocks": 0, "exact_stride": 0}
        self.pack = params.DECODE_ATTENTION.packer(
            k_transform=constants.attend[0],
            v_transform=constants.attend[1],
            kv_heads=codec.kv_heads,
            group=group,
            n=n,
            queries=group * n,
            query_tiles=plan.query_tiles,
            num_splits=plan.num_splits,
            min_pages=plan.min_pages,
            k_unit=constants.units[0],
            v_unit=constants.units[1],
            **own,
        )
        self._cuts: dict[tuple[int, int, int], tuple[int, tuple[int, int, int]]] = {}

    def cut(self, batch: int, max_length: int, max_exact: int) -> tuple[int, tuple[int, int, int]]:
        """Partial results of a row and KV head, and the grid."""
        key = batch, max_length, max_exact
        found = self._cuts.get(key)
        if found is None:
            if len(self._cuts) > 4096:
                self._cuts.clear()
            kv_heads = self.kv_heads
            found = self.plan.partials(max_length, max_exact), self.plan.grid(batch, kv_heads, max_length)
            self._cuts[key] = found
        return found


class _Step:
    """A launch whose arguments lie ready, for the steps that follow: only queries and results lie elsewhere then.

    It holds what it was made of, so that a later call is seen to be alike by identity. What it fills belongs to one
    thread.
    """

    def __init__(self, launch: DecodeLaunch, q: Any, arguments: tuple[Any, ...], stream: int, packed: int) -> None:
        self.launch, self.arguments, self.stream = launch, arguments, stream
        self.shape, self.stride, self.dtype, self.device = q.shape, q.stride(), q.dtype, q.device
        self.index, self.age, self.thread = q.device.index, scratch_age(), threading.get_ident()
        self.partials, self.grid, self.most_exact = 0, (0, 0, 0), -1
        size = params.DECODE_ATTENTION.size
        told = ctypes.string_at(ctypes.c_void_p.from_address(packed).value or 0, size)
        self.buffer = ctypes.create_string_buffer(told, size)
        self.pointer = ctypes.c_void_p(ctypes.addressof(self.buffer))
        self.address = ctypes.addressof(self.pointer)

    def again(
        self, q: Any, codec: Any, table: Any, scale: float, causal: bool, sink_logits: Any, most_exact: int
    ) -> tuple[Any, Any] | None:
        """As `decode_attention`, for the exact tokens that this was made for; None if anything else is not alike."""
        was_codec, was_table, was_scale, was_causal, was_sinks = self.arguments
        if (
            table is not was_table
            or codec is not was_codec
            or scale != was_scale
            or causal is not was_causal
            or sink_logits is not was_sinks
            or q.shape != self.shape
            or q.dtype is not self.dtype
            or q.stride() != self.stride
            or q.device != self.device
            or current_stream(self.device) != self.stream
            or scratch_age() != self.age
            or current_device() != self.index
            or threading.get_ident() != self.thread
        ):
            return None
        launch = self.launch
        if most_exact != self.most_exact:
            cut = launch.cut(self.shape[0], 0 if table is None else table.max_length, most_exact)
            if cut != (self.partials, self.grid):
                return None
            self.most_exact = most_exact
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(self.shape[:3], dtype=torch.float32, device=self.device)
        _pack_q(self.buffer, _Q_AT, q.data_ptr())
        _pack_results(self.buffer, _OUT_AT, out.data_ptr(), lse.data_ptr())
        launch.kernel.launch(self.grid, launch.threads, self.stream, self.address)
        return out, lse


_Q_AT, _OUT_AT = (params.DECODE_ATTENTION.offsets[name] for name in ("q", "out"))
_pack_q, _pack_results = struct.Struct("=Q").pack_into, struct.Struct("=QQ").pack_into


def decode_attention(
    q: Any,
    codec: Codec,
    table: PageTable | None,
    exact: ExactTokens | None,
    scale: float,
    causal: bool,
    sink_logits: Any | None,
) -> tuple[Any, Any]:
    views = exact.views if exact is not None else {} if table is None else table.views
    step, most_exact = views.get("cuda step"), 0 if exact is None else exact.max_length
    if step is not None:
        results = step.again(q, codec, None if exact is None else table, scale, causal, sink_logits, most_exact)
        if results is not None:
            return results
    known = "cuda" in views
    batch, q_heads, n, _ = q.shape
    device, kv_heads = q.device, codec.kv_heads
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((batch, q_heads, n), dtype=torch.float32, device=device)
    if out.numel() == 0:
        return out, lse
    tokens, _copies = (_NO_EXACT, None) if exact is None else _exact_members(exact)
    exact_dtype = q.dtype if exact is None else exact.k.dtype
    with on_device(device):
        constants = constants_of(codec, device)
        key = "decode_attention", q_heads, n, q.dtype, exact_dtype
        launch = constants.launches.get(key)
        if launch is None:
            dtypes = dtype_of(q), dtype_name(exact_dtype)
            launch = DecodeLaunch(codec, constants, q_heads // kv_heads, n, dtypes, device.index)
            constants.launches[key] = launch
        stream = current_stream(device)
        max_length = 0 if table is None else table.max_length
        partial_count, grid = launch.cut(batch, max_length, most_exact)
        heads = batch * kv_heads * launch.plan.query_tiles
        parts = heads * partial_count * launch.plan.query_tile  # a vector, its maximum and its sum each
        part = partials(device, stream, parts * (launch.width + 2))
        packed = launch.pack(
            q=q.data_ptr(),
            sink_logits=0 if sink_logits is None else sink_logits.data_ptr(),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            part=part,
            part_ml=part + 4 * parts * launch.width,
            counter=counters(device, stream, heads),
            q_stride=q.stride()[:3],
            out_stride=out.stride()[:3],
            causal=causal,
            partials=partial_count,
            max_length=max_length,
            scale_log2=scale * LOG2E,
            **(_NO_TABLE if table is None else table_members(table)),
            **tokens,
        )
        launch.kernel.launch(grid, launch.threads, stream, packed)
        if known and "cuda" in views:  # these tokens come step by step
            arguments = codec, None if exact is None else table, scale, causal, sink_logits  # no table holds itself
            views["cuda step"] = step = _Step(launch, q, arguments, stream, packed)
            step.partials, step.grid, step.most_exact = partial_count, grid, most_exact
    return out, lse


_NO_TABLE = {"base": 0, "page_table": 0, "lengths": 0, "max_pages": 0}
_NO_EXACT = {"exact_k": 0, "exact_v": 0, "exact_lengths": 0, "k_stride": (0, 0, 0), "v_stride": (0, 0, 0)}


def _exact_members(exact: ExactTokens) -> tuple[dict[str, Any], Any]:
    """Exact tokens' members of Params, found out at their first use; and the copies of tokens whose rows do not lie as
    the kernel reads them, which are made anew at each use."""
    view, copies = exact.views.get("cuda"), None
    if view is None:
        k, v = aligned_rows(exact.k), aligned_rows(exact.v)
        view = {
            "exact_k": k.data_ptr(),
            "exact_v": v.data_ptr(),
            "exact_lengths": exact.lengths.data_ptr(),
            "k_stride": k.stride()[:3],
            "v_stride": v.stride()[:3],
        }
        if k is exact.k and v is exact.v:
            exact.views["cuda"] = view
        else:
            copies = k, v
    return view, copies
