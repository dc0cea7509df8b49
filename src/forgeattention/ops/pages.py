"""encode, append_tokens, decode_pages, decode_into, compact: pages and exact tokens written and read back."""

from __future__ import annotations

from typing import Any

from ..codec.codec import Codec
from ..codec.spec import PAGE
from .arrays import FLOATS, Array, DType, dtype_name, dtype_of, empty_like, is_contiguous
from .checks import (
    check_codec,
    check_floats,
    check_index,
    check_table,
    check_vectors,
    describe,
    fail,
    looks,
    note_passed,
    passed,
)
from .decorator import op
from .registry import launch
from .table import PageTable


def _encode_fake(k: Any, v: Any, codec: Codec, out: Any, offsets: Any) -> None:
    return None


@op(fake=_encode_fake, mutates=("out",))
def encode(k: Array, v: Array, codec: Codec, out: Array | None, offsets: Array, *, backend: str = "auto") -> None:
    """Encode whole pages.

    Args:
        k, v: [kv_heads, 64 n, head_dim], float32, float16 or bfloat16; any strides with a contiguous last axis.
        codec: the layer's codec.
        out: contiguous uint8 array that takes the pages, or None when `offsets` are absolute addresses. Code that
            torch traces must give it: a tracer orders operators by the tensors that they read and write.
        offsets: int64 [n], byte offset in `out` of each page of kv_heads records. Pages must not overlap.
        backend: "auto" or a backend's name.

    Raises:
        ValueError: a wrong shape or dtype, an offset outside `out`, NaN or infinity, vectors whose scale exceeds
            the scale format. Nothing is written then. (CUDA reports values lazily: see backends/cuda/pages.py.)
    """
    check_codec("encode", codec)
    arrays = (k, v, offsets) if out is None else (k, v, offsets, out)
    asked = looks("encode", *arrays, head_dim=codec.head_dim, kv_heads=codec.kv_heads)
    if not passed(asked):
        check_vectors("encode", "k", k, codec, 3, codec.kv_heads)
        check_vectors("encode", "v", v, codec, 3, codec.kv_heads)
        tokens = k.shape[1]
        if tokens % PAGE or v.shape[1] != tokens or dtype_of(v) != dtype_of(k):
            raise fail("encode", f"k and v alike with a multiple of {PAGE} tokens", f"{describe(k)} and {describe(v)}")
        check_index("encode", "offsets", offsets, "int64", (tokens // PAGE,))
        if out is not None and dtype_of(out) != "uint8":
            raise fail("encode", "out uint8", describe(out))
        note_passed(asked)
    run = launch("encode", k, backend)
    if k.shape[1]:
        run(k, v, codec, out, offsets)


def _append_fake(to_k: Any, to_v: Any, lengths: Any, k: Any, v: Any) -> None:
    return None


@op(fake=_append_fake, mutates=("to_k", "to_v", "lengths"))
def append_tokens(to_k: Array, to_v: Array, lengths: Array, k: Array, v: Array, *, backend: str = "auto") -> None:
    """Write new exact tokens behind those that each row has, in place. MLX's arrays do not stay in place.

    Args:
        to_k, to_v: [batch, kv_heads, capacity, head_dim], any strides with a contiguous last axis.
        lengths: int32 [batch], valid tokens of each row; n is added to it. A row without room for n more tokens stays
            as it is, and so does its length.
        k, v: [batch, kv_heads, n, head_dim] in the dtype of to_k.
        backend: "auto" or a backend's name.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    name = "append_tokens"
    asked = looks(name, to_k, to_v, lengths, k, v)
    if not passed(asked):
        check_floats(name, "to_k", to_k, 4)
        batch, heads, _, dim = to_k.shape
        if tuple(to_v.shape) != tuple(to_k.shape) or dtype_of(to_v) != dtype_of(to_k):
            raise fail(name, f"to_v {describe(to_k)} like to_k", describe(to_v))
        check_index(name, "k", k, dtype_of(to_k), (batch, heads, "n", dim))
        check_index(name, "v", v, dtype_of(to_k), (batch, heads, k.shape[2], dim))
        check_index(name, "lengths", lengths, "int32", (batch,))
        note_passed(asked)
    launch(name, to_k, backend)(to_k, to_v, lengths, k, v)


def _decode_pages_fake(codec: Codec, table: PageTable, *, dtype: Any, rotated: bool) -> tuple[Any, Any]:
    width = codec.format.padded_dim if rotated else codec.head_dim
    shape = table.lengths.shape[0], codec.kv_heads, table.max_length, width
    k, v = (empty_like(table.lengths, shape, dtype_name(dtype)) for _ in range(2))
    return k, v


@op(fake=_decode_pages_fake)
def decode_pages(
    codec: Codec, table: PageTable, *, dtype: DType = "float32", rotated: bool = False, backend: str = "auto"
) -> tuple[Array, Array]:
    """Decode the tokens of a table.

    Args:
        codec: the layer's codec.
        table: the tokens.
        dtype: of the results, as a name or a framework's dtype.
        rotated: give the stored vectors y = A (x - mu), padded_dim wide, instead of x.
        backend: "auto" or a backend's name.

    Returns:
        k and v [batch, kv_heads, table.max_length, head_dim] in the framework of `table.lengths`; zero from each
        row's length on.
    """
    check_codec("decode_pages", codec)
    check_table("decode_pages", table, None)
    name = dtype_name(dtype)
    if name not in FLOATS:
        raise fail("decode_pages", f"dtype of {', '.join(FLOATS)}", name)
    return launch("decode_pages", table.lengths, backend)(codec, table, name, rotated)


def _decode_into_fake(codec: Codec, table: PageTable, k: Any, v: Any, first: Any) -> None:
    return None


@op(fake=_decode_into_fake, mutates=("k", "v"))
def decode_into(codec: Codec, table: PageTable, k: Array, v: Array, first: int, *, backend: str = "auto") -> None:
    """Decode the tokens of a table into arrays that are there already. MLX's arrays do not stay in place.

    Args:
        codec: the layer's codec.
        table: the tokens.
        k, v: contiguous [batch, kv_heads, n, head_dim] of one dtype. Of each row, the indices `first` to
            `first + table.max_length` are written: its tokens, and zero from its length on.
        first: index of each row's first token.
        backend: "auto" or a backend's name.

    Raises:
        ValueError: a wrong shape or dtype, strides, too little room. Nothing is written then.
    """
    name = "decode_into"
    check_codec(name, codec)
    check_table(name, table, None, k)
    shape = (table.lengths.shape[0], codec.kv_heads, "n", codec.head_dim)
    check_floats(name, "k", k, 4)
    for what, x in (("k", k), ("v", v)):
        check_index(name, what, x, dtype_of(k), (*shape[:2], k.shape[2], shape[3]))
        if not is_contiguous(x):
            raise fail(name, f"{what} contiguous", "other strides")
    if first < 0 or first + table.max_length > k.shape[2]:
        raise fail(name, f"room for {table.max_length} tokens from index {first} on", k.shape[2])
    run = launch(name, k, backend)
    if table.max_length:
        run(codec, table, k, v, first)


def _compact_fake(base: Any, offsets: Any, page_bytes: int) -> Any:
    return empty_like(offsets, (offsets.shape[0], page_bytes), "uint8")


@op(fake=_compact_fake)
def compact(base: Array | None, offsets: Array, page_bytes: int, *, backend: str = "auto") -> Array:
    """Copy pages side by side, byte for byte: nothing is coded again.

    Args:
        base: uint8 array that holds the pages, or None when `offsets` are absolute addresses (CPU and CUDA).
        offsets: int64 [pages], byte offset of each page from the start of `base`.
        page_bytes: bytes of a page, a multiple of 16.
        backend: "auto" or a backend's name.

    Returns:
        uint8 [pages, page_bytes] in the framework of `offsets`.

    Raises:
        ValueError: wrong shapes or dtypes, pages outside of `base` (off the CPU this is not looked for).
    """
    check_index("compact", "offsets", offsets, "int64", ("pages",))
    if page_bytes < 16 or page_bytes % 16:
        raise fail("compact", "page_bytes a positive multiple of 16", page_bytes)
    if base is not None and dtype_of(base) != "uint8":
        raise fail("compact", "base uint8", describe(base))
    return launch("compact", offsets, backend)(base, offsets, page_bytes)
