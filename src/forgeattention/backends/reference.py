"""The float64 NumPy oracle as a backend: slow, and chosen only by name."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import reference
from ..codec.codec import Codec
from ..codec.spec import PAGE
from ..ops.arrays import dtype_of, from_numpy, to_numpy
from ..ops.sparse import Scores, Threshold
from ..ops.table import ExactTokens, PageTable
from ..reference import sparse
from ..reference.attention import attention
from ..reference.pages import decode_page
from . import reference_sparse
from .reference_sparse import sparse_threshold as sparse_threshold

U8 = NDArray[np.uint8]


def available() -> tuple[bool, str]:
    return True, "NumPy in float64"


def _pages(op: str, codec: Codec, table: PageTable, row: int) -> tuple[U8, int]:
    """Pages [n, kv_heads, record_bytes] of a row, copied, and the row's length."""
    length = int(to_numpy(table.lengths)[row])
    if not 0 <= length <= table.max_length:
        raise ValueError(f"[{op}] expected lengths within max_length {table.max_length}; got {length}")
    count = -(-length // PAGE)
    offsets = to_numpy(table.offsets)[row, :count]
    size = codec.page_bytes
    if table.base is None:
        parts = [np.frombuffer(ctypes.string_at(int(o), size), np.uint8) for o in offsets]
    else:
        flat = to_numpy(table.base).reshape(-1)
        if count and not (offsets.min() >= 0 and offsets.max() + size <= flat.size):
            raise ValueError(f"[{op}] expected page offsets within {flat.size} bytes; got {int(offsets.max())}")
        parts = [flat[o : o + size] for o in offsets]
    pages = np.stack(parts) if parts else np.zeros((0, size), np.uint8)
    return pages.reshape(count, codec.kv_heads, codec.format.record_bytes), length


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
        pages, length = _pages("decode_pages", codec, table, row)
        if not length:
            continue
        if rotated:
            y = [[decode_page(record, codec) for record in page] for page in pages]
            k, v = (np.concatenate([np.stack([r[side] for r in page]) for page in y], 1) for side in (0, 1))
        else:
            k, v = reference.decode_pages(pages, codec)
        out[0, row, :, :length], out[1, row, :, :length] = k[:, :length], v[:, :length]
    return from_numpy(out[0], table.lengths, dtype), from_numpy(out[1], table.lengths, dtype)


def decode_attention(
    q: Any,
    codec: Codec,
    table: PageTable | None,
    exact: ExactTokens | None,
    scale: float,
    causal: bool,
    sink_logits: Any | None,
) -> tuple[Any, Any]:
    q64 = to_numpy(q).astype(np.float64)
    out, lse = np.zeros(q64.shape), np.full(q64.shape[:3], -np.inf)
    empty = np.zeros((0, codec.kv_heads, codec.format.record_bytes), np.uint8)
    for row in range(q64.shape[0]):
        pages, length = (empty, 0) if table is None else _pages("decode_attention", codec, table, row)
        k = v = None
        if exact is not None:
            n = int(to_numpy(exact.lengths)[row])
            if not 0 <= n <= exact.max_length:
                raise ValueError(f"[decode_attention] expected exact lengths within {exact.max_length}; got {n}")
            k, v = to_numpy(exact.k)[row, :, :n], to_numpy(exact.v)[row, :, :n]
        out[row], lse[row] = reference.decode_attention(q64[row], pages, length, codec, scale, k, v, causal)
    if sink_logits is not None:
        extra = np.broadcast_to(to_numpy(sink_logits).astype(np.float64)[None, :, None], lse.shape)
        out, lse = reference.merge([(out, lse), (np.zeros_like(out), extra)])
    return from_numpy(out, q, dtype_of(q)), from_numpy(lse, q, "float32")


def prefill_attention(q: Any, codec: Codec, table: PageTable, scale: float) -> tuple[Any, Any]:
    q64 = to_numpy(q).astype(np.float64)
    out, lse = np.zeros(q64.shape), np.full(q64.shape[:3], -np.inf)
    for row in range(q64.shape[0]):
        pages, length = _pages("prefill_attention", codec, table, row)
        if length:
            k, v = reference.decode_pages(pages, codec)
            out[row], lse[row] = attention(q64[row], k[:, :length], v[:, :length], scale)
    return from_numpy(out, q, "float32"), from_numpy(lse, q, "float32")


def qk_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    q64 = to_numpy(q).astype(np.float64)
    out = np.full((*q64.shape[:3], table.max_length), -np.inf)
    for row in range(q64.shape[0]):
        pages, length = _pages("qk_scores", codec, table, row)
        if length:
            out[row, ..., :length] = reference.qk_scores(q64[row], pages, length, codec, scale)
    return from_numpy(out, q, "float32")


def value_sum(p: Any, codec: Codec, table: PageTable) -> Any:
    p64 = to_numpy(p).astype(np.float64)
    out = np.zeros((*p64.shape[:3], codec.head_dim))
    for row in range(p64.shape[0]):
        pages, length = _pages("value_sum", codec, table, row)
        weights = p64[row, ..., :length]
        if not np.isfinite(weights).all():
            raise ValueError("[value_sum] expected finite weights; got NaN or infinity")
        if length:
            out[row] = reference.value_sum(weights, pages, codec)
    return from_numpy(out, p, "float32")


def sparse_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Scores:
    scores = qk_scores(q, codec, table, scale)
    return Scores(scores, from_numpy(sparse.page_statistics(to_numpy(scores)), q, "float32"))


def sparse_attention(
    scores: Scores, threshold: Threshold, codec: Codec, table: PageTable, other: tuple[Any, Any] | None
) -> tuple[Any, Any]:
    pages = [_pages("sparse_attention", codec, table, row) for row in range(scores.scores.shape[0])]
    return reference_sparse.sparse_attention(scores, threshold, codec, pages, other)


def page_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    q64 = to_numpy(q).astype(np.float64)
    out = np.full((*q64.shape[:3], -(-table.max_length // PAGE)), -np.inf)
    for row in range(q64.shape[0]):
        pages, _ = _pages("page_scores", codec, table, row)
        if len(pages):
            out[row, ..., : len(pages)] = sparse.page_scores(q64[row], pages, codec, scale)
    return from_numpy(out, q, "float32")
