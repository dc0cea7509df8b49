"""CUDA backend: launches of kernels/cuda on torch tensors, on torch's current stream.

No op but prefill of uneven rows waits for the device, and all can be captured in CUDA graphs: lengths and page tables
are read by the kernels, and launch shapes follow from the host's upper bounds. Captured launches share scratch with the
stream they were captured on: do not replay two graphs captured on one stream at the same time.

`encode` therefore cannot raise for values: a page with NaN or infinity is left undefined and sets a flag on the device,
which `encode_failed` reads.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..codec.codec import Codec
from ..codec.spec import PAGE
from ..ops.arrays import dtype_of
from ..ops.table import ExactTokens, PageTable
from . import cuda_args as args
from . import nvrtc

log = logging.getLogger("forgeattention")

LOG2E = math.log2(math.e)
available = nvrtc.available


@lru_cache
def limits(device: int) -> args.Limits:
    return args.Limits(*nvrtc.attributes(device, *args.LIMITS))


class _Constants:
    """A codec's transforms on a device."""

    def __init__(self, codec: Codec, device: Any) -> None:
        self._device = device
        self._keep: list[Any] = []
        self.kernels: dict[Any, Any] = {}  # looked up by what a call varies in, as macros take long to put together
        sides = codec.k_transform, codec.v_transform
        self.encode, self.attend = ([self._args(args.Side.of(codec, t, e)) for t in sides] for e in (True, False))

    def kernel(self, key: tuple[Any, ...], options: Callable[[], tuple[args.Macros, int]]) -> nvrtc.Kernel:
        """The kernel key[0], of which the key tells the variant; `options`: its macros and bytes of shared memory."""
        if key not in self.kernels:
            macros, shared = options()
            self.kernels[key] = nvrtc.kernel(key[0], macros, self._device.index, shared)
        return self.kernels[key]

    def _put(self, array: Any) -> int:
        tensor = torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(self._device)
        self._keep.append(tensor)
        return int(tensor.data_ptr())

    def _args(self, side: args.Side) -> args.TransformArgs:
        arrays = side.signs, side.in_matrix, side.out_matrix, side.mu
        return args.TransformArgs(*(0 if x is None else self._put(x) for x in arrays), side.stride, side.mu_stride)


_HERE: AbstractContextManager[None] = nullcontext()


def _on(device: Any) -> AbstractContextManager[Any]:
    """Makes a device the current one; costs little where it is."""
    return _HERE if torch.cuda.current_device() == device.index else torch.cuda.device(device)


def _stream(device: Any) -> int:
    # torch.cuda.current_stream makes an object first, which takes ten times as long.
    return torch._C._cuda_getCurrentRawStream(device.index)


_constants: weakref.WeakKeyDictionary[Codec, dict[Any, _Constants]] = weakref.WeakKeyDictionary()
_counters: dict[tuple[int, int], Any] = {}  # every launch leaves them zero
_parts: dict[tuple[int, int], Any] = {}
_replaced: list[Any] = []
_bad: dict[int, Any] = {}


def _constants_of(codec: Codec, device: Any) -> _Constants:
    per_device = _constants.setdefault(codec, {})
    if device not in per_device:
        per_device[device] = _Constants(codec, device)
    return per_device[device]


def _scratch_of(kept: dict[tuple[int, int], Any], device: Any, stream: int, count: int, dtype: Any) -> Any:
    """A buffer of at least `count` elements, zero at first. One per stream: launches on one stream do not overlap."""
    key = (device.index, stream)
    have = kept.get(key)
    if have is None or have.numel() < count:
        if have is not None:
            _replaced.append(have)  # graphs captured with it may be replayed
        have = kept[key] = torch.zeros(max(count, 65536), dtype=dtype, device=device)
    return have


def _bad_of(device: Any) -> Any:
    if device.index not in _bad:
        _bad[device.index] = torch.zeros(1, dtype=torch.int32, device=device)
    return _bad[device.index]


def encode_failed(device: Any) -> bool:
    """Whether an `encode` since the last call met NaN, infinity or a scale that does not fit. Waits for the device."""
    flag = _bad_of(torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device))
    failed = bool(flag.item())
    if failed:
        flag.zero_()
    return failed


def _address(x: Any) -> int:
    return 0 if x is None else x.data_ptr()


def _rows(x: Any) -> Any:
    """The tensor with a contiguous last axis and rows that start at multiples of 16 bytes; a copy if it is not so."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    size = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(s % size == 0 for s, n in zip(x.stride()[:-1], x.shape[:-1]) if n > 1)
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


@lru_cache
def _warn_of_plain_codes() -> None:
    log.warning("CUDA pages are coded without refinement and noise shaping: as readable, less faithful than the CPU's")


_encode_params = args.Packer(args.EncodeParams)
_decode_pages_params = args.Packer(args.DecodePagesParams)
_merge_params = args.Packer(args.MergeParams)
_append_tokens_params = args.Packer(args.AppendTokensParams)
_scores_params = args.Packer(args.ScoresParams)


def encode(k: Any, v: Any, codec: Codec, out: Any | None, offsets: Any) -> None:
    if codec.spec.refine or codec.shaping is not None:
        _warn_of_plain_codes()
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    with _on(k.device):
        constants = _constants_of(codec, k.device)
        kernel = constants.kernel(
            ("encode", k.dtype),
            lambda: (args.encode_macros(codec, dtype_of(k)), args.encode_shared_bytes(codec.format)),
        )
        params = _encode_params(
            *map(_address, (k, v, out, offsets, _bad_of(k.device))),
            *map(bytes, constants.encode),
            *k.stride()[:2],
            *v.stride()[:2],
            codec.k_codebook.unit,
            codec.v_codebook.unit,
        )
        kernel.launch((k.shape[1] // PAGE, codec.kv_heads, 1), 256, _stream(k.device), params)


def append_tokens(to_k: Any, to_v: Any, lengths: Any, k: Any, v: Any) -> None:
    """Writes k, v [batch, heads, n, dim] behind the `lengths` int32 [batch] tokens of to_k, to_v [batch, heads,
    capacity, dim] and adds n to the lengths. A row without room stays as it is."""
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    device, size = k.device, k.element_size()
    with _on(device):
        kernel = nvrtc.kernel("append_tokens", args.append_tokens_macros(), device.index, 0)
        params = _append_tokens_params(
            *map(_address, (k, v, to_k, to_v, lengths)),
            *(size * s for x in (k, v, to_k, to_v) for s in x.stride()[:3]),
            *(k.shape[1], k.shape[2], k.shape[3] * size // 4, to_k.shape[2]),
        )
        kernel.launch((k.shape[0], 1, 1), 256, _stream(device), params)


def merge(o1: Any, lse1: Any, o2: Any, lse2: Any) -> tuple[Any, Any]:
    """`ops.merge` of o1 [batch, heads, n, dim] and a float32 o2 of the same shape, in one launch."""
    o1, lse1, o2, lse2 = o1 if o1.stride(-1) == 1 else o1.contiguous(), *(x.contiguous() for x in (lse1, o2, lse2))
    out = torch.empty(o1.shape, dtype=o1.dtype, device=o1.device)
    lse = torch.empty_like(lse1)
    if out.numel() == 0:
        return out, lse
    with _on(o1.device):
        kernel = nvrtc.kernel("merge", args.merge_macros(o1.shape[3], dtype_of(o1)), o1.device.index, 0)
        rows = lse1.numel()
        params = _merge_params(
            *map(_address, (o1, lse1, o2, lse2, out, lse)), *o1.stride()[:3], rows, o1.shape[1], o1.shape[2]
        )
        kernel.launch((-(-rows // 8), 1, 1), 256, _stream(o1.device), params)
    return out, lse


def compact(base: Any | None, offsets: Any, page_bytes: int) -> Any:
    """Pages are taken to lie where `offsets` say: looking would wait for the device."""
    out = torch.empty((offsets.shape[0], page_bytes), dtype=torch.uint8, device=offsets.device)
    if out.numel() == 0:
        return out
    offsets = offsets.contiguous()
    with _on(offsets.device):
        kernel = nvrtc.kernel("compact", args.COMPACT_MACROS, offsets.device.index, 0)
        params = args.CompactParams(*map(_address, (base, offsets, out)), page_bytes // 16)
        grid = (-(-page_bytes // (16 * 4 * 256)), offsets.shape[0], 1)
        kernel.launch(grid, 256, _stream(offsets.device), params)
    return out


def decode_pages(codec: Codec, table: PageTable, dtype: str, rotated: bool) -> tuple[Any, Any]:
    fmt, device = codec.format, table.lengths.device
    width = fmt.padded_dim if rotated else codec.head_dim
    shape = (table.lengths.shape[0], codec.kv_heads, table.max_length, width)
    k, v = (torch.empty(shape, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    if k.numel() == 0:
        return k, v

    def options() -> tuple[args.Macros, int]:
        extra = {"FORGE_WIDTH": width, "FORGE_TYPE": args.TYPES[dtype]}
        if rotated:
            extra["FORGE_ROTATION"] = args.ROTATIONS["none"]
        return args.macros(codec, args.DecodePagesParams, **extra), args.decode_pages_shared_bytes(fmt)

    with _on(device):
        constants = _constants_of(codec, device)
        kernel = constants.kernel(("decode_pages", dtype, rotated), options)
        transforms = constants.attend if not rotated else [_without_mu(t) for t in constants.attend]
        params = _decode_pages_params(
            *map(_address, (table.base, table.offsets, table.lengths, k, v)),
            *map(bytes, transforms),
            table.offsets.stride(0),
            codec.kv_heads,
            table.max_length,
            codec.k_codebook.unit,
            codec.v_codebook.unit,
        )
        kernel.launch((-(-table.max_length // PAGE), codec.kv_heads, shape[0]), 256, _stream(device), params)
    return k, v


def _without_mu(t: args.TransformArgs) -> args.TransformArgs:
    return args.TransformArgs(t.signs, t.in_matrix, t.out_matrix, None, t.stride, 0)


_decode_params = args.Packer(args.DecodeParams)
_NONE = (0, 0, 0)


class _DecodeLaunch:
    """What the launches for one codec, number of queries and pair of dtypes have in common."""

    def __init__(self, codec: Codec, constants: _Constants, group: int, n: int, dtypes: tuple[str, str], device: int):
        self.plan = args.decode_plan(codec.format, codec.kv_heads, group * n, limits(device))
        macros = self.plan.macros(codec, *dtypes)
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
    exact_k, exact_v = (q, q) if exact is None else (_rows(exact.k), _rows(exact.v))
    with _on(device):
        constants = _constants_of(codec, device)
        key = ("decode_attention", q_heads, n, q.dtype, exact_k.dtype)
        launch = constants.kernels.get(key)
        if launch is None:
            dtypes = dtype_of(q), dtype_of(exact_k)
            launch = _DecodeLaunch(codec, constants, q_heads // kv_heads, n, dtypes, device.index)
            constants.kernels[key] = launch
        stream = _stream(device)
        heads = batch * kv_heads * launch.plan.blocks
        max_length = 0 if table is None else table.max_length
        slots = launch.plan.slots(max_length, 0 if exact is None else exact.max_length)
        parts = heads * slots * launch.plan.queries  # a vector, its maximum and its sum each
        part = _scratch_of(_parts, device, stream, parts * (launch.width + 2), torch.float32).data_ptr()
        params = _decode_params(
            q.data_ptr(),
            *(_NONE if table is None else map(_address, (table.base, table.offsets, table.lengths))),
            *(_NONE if exact is None else (exact_k.data_ptr(), exact_v.data_ptr(), exact.lengths.data_ptr())),
            0 if sink_logits is None else sink_logits.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
            part,
            part + 4 * parts * launch.width,
            _scratch_of(_counters, device, stream, heads, torch.int32).data_ptr(),
            *launch.transforms,
            *q.stride()[:3],
            *exact_k.stride()[:3],
            *exact_v.stride()[:3],
            0 if table is None else table.offsets.stride(0),
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


def _launch_scores(stem: str, codec: Codec, table: PageTable, x: Any, out: Any, scale: float, groups: int) -> None:
    """A launch of qk_scores or value_sum with `groups` CTAs across the pages."""
    side = int(stem == "value_sum")
    constants = _constants_of(codec, x.device)
    shared = args.value_sum_shared_bytes(codec.format) if side else 0
    kernel = constants.kernel((stem, x.dtype), lambda: (args.scores_macros(codec, dtype_of(x)), shared))
    group, n = x.shape[1] // codec.kv_heads, x.shape[2]
    blocks = -(-group * n // 8)
    params = _scores_params(
        *map(_address, (x, table.base, table.offsets, table.lengths, out)),
        bytes(constants.attend[side]),
        *x.stride()[:3],
        table.offsets.stride(0),
        *(codec.kv_heads, group, n, group * n, blocks, table.max_length),
        scale,
        (codec.v_codebook if side else codec.k_codebook).unit,
    )
    grid = (groups, codec.kv_heads * blocks, x.shape[0])
    kernel.launch(grid, 32 * args.scores_warps(codec.format), _stream(x.device), params)


def qk_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty((*q.shape[:3], table.max_length), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out
    with _on(q.device):
        pages, warps = -(-table.max_length // PAGE), args.scores_warps(codec.format)
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
    with _on(p.device):
        pages = -(-table.max_length // PAGE)
        # By max_length alone, so that a row's result ignores the batch.
        splits = max(1, min(64, pages // (2 * args.scores_warps(codec.format))))
        out = torch.empty((splits, *p.shape[:3], codec.head_dim), dtype=torch.float32, device=p.device)
        _launch_scores("value_sum", codec, table, p, out, 1.0, splits)
        return out.sum(0)


def prefill_attention(q: Any, codec: Codec, table: PageTable, scale: float) -> tuple[Any, Any]:
    from .cuda_prefill import prefill_attention

    return prefill_attention(q, codec, table, scale)


def sparse_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    from .cuda_sparse import sparse_scores

    return sparse_scores(q, codec, table, scale)


def sparse_threshold(scores: Any, table: PageTable, top_k: Any, top_p: float | None, exact_lse: Any) -> Any:
    from .cuda_sparse import sparse_threshold

    return sparse_threshold(scores, table, top_k, top_p, exact_lse)


def sparse_attention(scores: Any, threshold: Any, codec: Codec, table: PageTable, other: Any) -> tuple[Any, Any]:
    from .cuda_sparse import sparse_attention

    return sparse_attention(scores, threshold, codec, table, other)


def page_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    from .cuda_sparse import page_scores

    return page_scores(q, codec, table, scale)
