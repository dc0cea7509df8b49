"""The native CPU kernels (kernels/cpu): reads pointers and strides off arrays and makes one native call per op."""

from __future__ import annotations

import importlib
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..codec.codec import Codec
from ..codec.packing import key_orders
from ..codec.spec import CODES, SCALE_FORMATS, SCALE_RULES
from ..codec.transform import random_signs
from ..ops.arrays import FLOATS, dtype_of, empty_like, is_torch
from ..ops.checks import fail
from ..ops.table import ExactTokens, PageTable
from ..ops.threads import get_num_threads

try:
    _native: Any = importlib.import_module("forgeattention._native")
    _missing = ""
except ImportError as error:
    _native, _missing = None, f"the native module is not built ({error})"

DTYPES = {name: i for i, name in enumerate(FLOATS)}
_codecs: WeakKeyDictionary[Codec, Any] = WeakKeyDictionary()


def available() -> tuple[bool, str]:
    if _native is None:
        return False, _missing
    return True, f"{_native.isa()} (of {', '.join(_native.isas())})"


def isas() -> list[str]:
    """Instruction sets of this processor and build, best first."""
    return _native.isas()


def use_isa(name: str) -> None:
    """Use one of `isas()` from now on; the environment variable FORGEATTN_CPU_ISA does it from the start."""
    _native.use_isa(name)


def shares_torch_threads() -> bool:
    """Whether the kernels run on PyTorch's own threads, as they do once it is loaded on Linux, or on this module's."""
    return _native.shares_torch_threads()


def read_pass(data: NDArray[np.uint8]) -> int:
    """Reads every byte of a contiguous array once with the kernels' threads: the yardstick of the benchmarks."""
    return _native.read_pass(_address(data), data.size, get_num_threads())


def _native_codec(codec: Codec) -> Any:
    native = _codecs.get(codec)
    if native is None:
        native = _codecs[codec] = _make_codec(codec)
    return native


def _make_codec(codec: Codec) -> Any:
    spec, fmt = codec.spec, codec.format
    none = np.zeros(0, np.float32)
    hadamard = spec.rotation == "hadamard"
    k, v = codec.k_transform, codec.v_transform

    def columns(matrix: Any) -> Any:
        return none if hadamard else np.ascontiguousarray(matrix.transpose(0, 2, 1), np.float32)

    signs = random_signs(fmt.padded_dim, spec.seed).astype(np.float32)
    scales = np.ones((1, fmt.padded_dim), np.float32) if k.diagonal is None else k.diagonal
    return _native.Codec(
        codec.head_dim,
        fmt.padded_dim,
        codec.kv_heads,
        SCALE_FORMATS.index(spec.scales),
        spec.key_mean,
        spec.refine,
        (spec.k_bits, CODES.index(fmt.k_code), codec.k_codebook.unit, SCALE_RULES.index(spec.k_scale_rule)),
        (spec.v_bits, CODES.index(fmt.v_code), codec.v_codebook.unit, SCALE_RULES.index(spec.v_scale_rule)),
        np.array(codec.k_codebook.levels, np.int8),
        np.array(codec.v_codebook.levels, np.int8),
        signs if hadamard else none,
        signs * scales,
        signs / scales,
        columns(k.forward),
        columns(k.inverse),
        none if hadamard else np.ascontiguousarray(k.inverse, np.float32),
        columns(v.forward),
        columns(v.inverse),
        none if k.mu is None else k.mu,
        none if v.mu is None else v.mu,
        *_by_rank(codec),
    )


def _by_rank(codec: Codec) -> tuple[Any, Any]:
    """The shaping's factors and weights with their channels in coding order."""
    shaping, none = codec.shaping, np.zeros(0, np.float32)
    if shaping is None:
        return none, none
    order, _ = key_orders(codec.format.padded_dim)
    number = np.arange(len(order))
    factor = shaping.factor[:, number[:, None, None], order[:, :, None], order[:, None, :]]
    return np.ascontiguousarray(factor), np.ascontiguousarray(shaping.weight[:, number[:, None], order])


def _address(x: Any) -> int:
    return x.data_ptr() if is_torch(x) else x.__array_interface__["data"][0]


def _strides(x: Any) -> tuple[int, ...]:
    """Strides in elements."""
    if is_torch(x):
        return x.stride()
    size = x.itemsize
    return tuple(s // size for s in x.strides)


def _view(op: str, name: str, x: Any) -> tuple[int, int, int, int, int]:
    """(address, dtype, three strides) of an array of three or four axes; a missing first axis has stride 0."""
    strides = _strides(x)
    if strides[-1] != 1 and x.shape[-1] > 1:
        raise fail(op, f"{name} with a contiguous last axis", f"strides {list(strides)}")
    lead = strides[:-1] if len(strides) == 4 else (0, *strides[:-1])
    return _address(x), DTYPES[dtype_of(x)], lead[0], lead[1], lead[2]


def _flat(op: str, name: str, x: Any) -> int:
    """Address of an array that must be contiguous."""
    contiguous = x.is_contiguous() if is_torch(x) else x.flags.c_contiguous
    if not contiguous:
        raise fail(op, f"{name} contiguous", f"strides {list(_strides(x))}")
    return _address(x)


def _bytes_of(op: str, name: str, x: Any | None) -> tuple[int, int]:
    if x is None:
        return 0, 0
    return _flat(op, name, x), x.numel() if is_torch(x) else x.size


def _table(op: str, table: PageTable) -> tuple[int, int, int, int, int, int]:
    base, size = _bytes_of(op, "table.base", table.base)
    strides = _strides(table.offsets)
    if table.offsets.shape[1] > 1 and strides[1] != 1:
        raise fail(op, "table.offsets with a contiguous last axis", f"strides {list(strides)}")
    lengths = _flat(op, "table.lengths", table.lengths)
    return base, size, _address(table.offsets), strides[0], lengths, table.max_length


def encode(k: Any, v: Any, codec: Codec, out: Any | None, offsets: Any) -> None:
    op = "encode"
    base, size = _bytes_of(op, "out", out)
    where = _flat(op, "offsets", offsets)
    pages = offsets.shape[0]
    _native.encode(
        _native_codec(codec), _view(op, "k", k), _view(op, "v", v), pages, base, size, where, get_num_threads()
    )


def compact(base: Any | None, offsets: Any, page_bytes: int) -> Any:
    pages = offsets.shape[0]
    out = empty_like(offsets, (pages, page_bytes), "uint8")
    start, size = _bytes_of("compact", "base", base)
    where = _flat("compact", "offsets", offsets)
    _native.compact(start, size, where, pages, page_bytes, _address(out), get_num_threads())
    return out


def decode_pages(codec: Codec, table: PageTable, dtype: str, rotated: bool) -> tuple[Any, Any]:
    batch = table.lengths.shape[0]
    shape = (batch, codec.kv_heads, table.max_length, codec.format.padded_dim if rotated else codec.head_dim)
    if dtype == "bfloat16" and not is_torch(table.lengths):
        raise fail("decode_pages", "dtype float32 or float16 for NumPy results", dtype)
    k, v = empty_like(table.lengths, shape, dtype), empty_like(table.lengths, shape, dtype)
    view = _table("decode_pages", table)
    _native.decode_pages(
        _native_codec(codec), view, batch, rotated, DTYPES[dtype], _address(k), _address(v), get_num_threads()
    )
    return k, v


def decode_attention(
    q: Any,
    codec: Codec,
    table: PageTable | None,
    exact: ExactTokens | None,
    scale: float,
    causal: bool,
    sink_logits: Any | None,
) -> tuple[Any, Any]:
    return _attention("decode_attention", q, codec, table, exact, scale, causal, sink_logits, dtype_of(q))


def prefill_attention(q: Any, codec: Codec, table: PageTable, scale: float) -> tuple[Any, Any]:
    return _attention("prefill_attention", q, codec, table, None, scale, False, None, "float32")


def _attention(
    op: str,
    q: Any,
    codec: Codec,
    table: PageTable | None,
    exact: ExactTokens | None,
    scale: float,
    causal: bool,
    sink_logits: Any | None,
    dtype: str,
) -> tuple[Any, Any]:
    shape = tuple(q.shape)
    out, lse = empty_like(q, shape, dtype), empty_like(q, shape[:3], "float32")
    exact_view = None
    if exact is not None:
        lengths = _flat(op, "exact.lengths", exact.lengths)
        exact_view = (_view(op, "exact.k", exact.k), _view(op, "exact.v", exact.v), lengths, exact.max_length)
    _native.attention(
        op,
        _native_codec(codec),
        shape[:3],
        _view(op, "q", q),
        None if table is None else _table(op, table),
        exact_view,
        scale,
        causal,
        0 if sink_logits is None else _flat(op, "sink_logits", sink_logits),
        DTYPES[dtype],
        _address(out),
        _address(lse),
        get_num_threads(),
    )
    return out, lse


def qk_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    shape = tuple(q.shape[:3])
    out = empty_like(q, (*shape, table.max_length), "float32")
    view = _table("qk_scores", table)
    native = _native_codec(codec)
    _native.qk_scores(native, shape, _view("qk_scores", "q", q), view, scale, _address(out), get_num_threads())
    return out


def value_sum(p: Any, codec: Codec, table: PageTable) -> Any:
    shape = tuple(p.shape[:3])
    p = p.contiguous() if is_torch(p) else np.ascontiguousarray(p)
    out = empty_like(p, (*shape, codec.head_dim), "float32")
    view = _table("value_sum", table)
    _native.value_sum(_native_codec(codec), shape, _address(p), view, _address(out), get_num_threads())
    return out


def sparse_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    from .cpu_sparse import sparse_scores

    return sparse_scores(q, codec, table, scale)


def sparse_threshold(scores: Any, table: PageTable, top_k: Any, top_p: float | None, exact_lse: Any) -> Any:
    from .cpu_sparse import sparse_threshold

    return sparse_threshold(scores, table, top_k, top_p, exact_lse)


def sparse_attention(scores: Any, threshold: Any, codec: Codec, table: PageTable, other: Any) -> tuple[Any, Any]:
    from .cpu_sparse import sparse_attention

    return sparse_attention(scores, threshold, codec, table, other)


def page_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    from .cpu_sparse import page_scores

    return page_scores(q, codec, table, scale)
