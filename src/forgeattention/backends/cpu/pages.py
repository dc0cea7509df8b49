"""Pages written, read back and moved by the native CPU kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...codec.codec import Codec
from ...ops.arrays import dtype_of, empty_like, is_torch
from ...ops.checks import fail
from ...ops.table import PageTable
from ...ops.threads import get_num_threads
from .native import native, native_codec
from .views import DTYPES, address, bytes_of, flat, table_view, view_of


def encode(k: Any, v: Any, codec: Codec, out: Any | None, offsets: Any) -> None:
    op = "encode"
    base, size = bytes_of(op, "out", out)
    where = flat(op, "offsets", offsets)
    pages = offsets.shape[0]
    native.encode(
        native_codec(codec), view_of(op, "k", k), view_of(op, "v", v), pages, base, size, where, get_num_threads()
    )


def compact(base: Any | None, offsets: Any, page_bytes: int) -> Any:
    pages = offsets.shape[0]
    out = empty_like(offsets, (pages, page_bytes), "uint8")
    start, size = bytes_of("compact", "base", base)
    where = flat("compact", "offsets", offsets)
    native.compact(start, size, where, pages, page_bytes, address(out), get_num_threads())
    return out


def decode_pages(codec: Codec, table: PageTable, dtype: str, rotated: bool) -> tuple[Any, Any]:
    batch = table.lengths.shape[0]
    shape = (batch, codec.kv_heads, table.max_length, codec.format.padded_dim if rotated else codec.head_dim)
    if dtype == "bfloat16" and not is_torch(table.lengths):
        raise fail("decode_pages", "dtype float32 or float16 for NumPy results", dtype)
    k, v = empty_like(table.lengths, shape, dtype), empty_like(table.lengths, shape, dtype)
    _decode(codec, table, k, v, rotated, 0)
    return k, v


def decode_into(codec: Codec, table: PageTable, k: Any, v: Any, first: int) -> None:
    _decode(codec, table, k, v, False, first)


def _decode(codec: Codec, table: PageTable, k: Any, v: Any, rotated: bool, first: int) -> None:
    """Decodes into contiguous k, v [batch, kv_heads, n, width] from index `first` on."""
    batch, _, n, width = k.shape
    dtype = dtype_of(k)
    skipped = first * width * (4 if dtype == "float32" else 2)
    native.decode_pages(
        native_codec(codec),
        table_view("decode_pages", table),
        batch,
        rotated,
        DTYPES[dtype],
        address(k) + skipped,
        address(v) + skipped,
        n,
        get_num_threads(),
    )


def append_tokens(to_k: Any, to_v: Any, lengths: Any, k: Any, v: Any) -> None:
    held = lengths.numpy() if is_torch(lengths) else lengths
    n, first = k.shape[2], held[:1]
    if len(first) and (held == first).all():
        if first[0] + n <= to_k.shape[2]:
            at = slice(first[0], first[0] + n)
            to_k[:, :, at], to_v[:, :, at] = k, v
            held += n
        return
    for row in np.flatnonzero(held + n <= to_k.shape[2]):
        at = slice(held[row], held[row] + n)
        to_k[row, :, at], to_v[row, :, at] = k[row], v[row]
        held[row] += n
