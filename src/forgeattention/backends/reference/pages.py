"""Pages written, read back and moved by the oracle."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from ... import reference
from ...codec.codec import Codec
from ...ops.arrays import dtype_of, from_numpy, to_numpy
from ...ops.table import PageTable
from ...reference.pages import decode_page
from .rows import pages_of_row


def encode(k: Any, v: Any, codec: Codec, out: Any | None, offsets: Any) -> None:
    pages = reference.encode(to_numpy(k), to_numpy(v), codec).reshape(-1, codec.page_bytes)
    where = to_numpy(offsets)
    if out is None:
        for page, address in zip(pages, where, strict=True):
            ctypes.memmove(int(address), page.ctypes.data, page.size)
        return
    flat = to_numpy(out).reshape(-1)
    if not (where.min() >= 0 and where.max() + codec.page_bytes <= flat.size):
        raise ValueError(f"[encode] expected offsets within {flat.size} bytes; got {int(where.max())}")
    for page, offset in zip(pages, where, strict=True):
        flat[offset : offset + codec.page_bytes] = page


def compact(base: Any | None, offsets: Any, page_bytes: int) -> Any:
    where = to_numpy(offsets)
    if base is None:
        parts = [ctypes.string_at(int(address), page_bytes) for address in where]
        pages = np.frombuffer(b"".join(parts), np.uint8).reshape(len(where), page_bytes)
    else:
        flat = to_numpy(base).reshape(-1)
        if len(where) and not (where.min() >= 0 and where.max() + page_bytes <= flat.size):
            raise ValueError(f"[compact] expected pages within {flat.size} bytes; got {int(where.max())}")
        pages = reference.compact(flat, where, page_bytes)
    return from_numpy(pages, offsets, "uint8")


def decode_pages(codec: Codec, table: PageTable, dtype: str, rotated: bool) -> tuple[Any, Any]:
    batch = table.lengths.shape[0]
    width = codec.format.padded_dim if rotated else codec.head_dim
    out = np.zeros((2, batch, codec.kv_heads, table.max_length, width))
    for row in range(batch):
        pages, length = pages_of_row("decode_pages", codec, table, row)
        if not length:
            continue
        if rotated:
            y = [[decode_page(record, codec) for record in page] for page in pages]
            k, v = (np.concatenate([np.stack([r[side] for r in page]) for page in y], 1) for side in (0, 1))
        else:
            k, v = reference.decode_pages(pages, codec)
        out[0, row, :, :length], out[1, row, :, :length] = k[:, :length], v[:, :length]
    return from_numpy(out[0], table.lengths, dtype), from_numpy(out[1], table.lengths, dtype)


def decode_into(codec: Codec, table: PageTable, k: Any, v: Any, first: int) -> None:
    at = slice(first, first + table.max_length)
    k[:, :, at], v[:, :, at] = decode_pages(codec, table, dtype_of(k), False)


def append_tokens(to_k: Any, to_v: Any, lengths: Any, k: Any, v: Any) -> None:
    n = k.shape[2]
    for row, length in enumerate(to_numpy(lengths).tolist()):
        if length + n <= to_k.shape[2]:
            to_k[row, :, length : length + n], to_v[row, :, length : length + n] = k[row], v[row]
            lengths[row] = length + n
