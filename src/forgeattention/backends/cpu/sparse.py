"""Sparse attention by the native CPU kernels."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from ...codec.codec import Codec
from ...codec.spec import PAGE
from ...ops.arrays import dtype_of, empty_like, is_torch
from ...ops.table import PageTable, Scores, Threshold
from ...ops.threads import get_num_threads
from .attention import merge
from .native import native, native_codec
from .views import address, flat, table_view, view_of


def sparse_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Scores:
    op, shape = "sparse_scores", tuple(q.shape[:3])
    scores = empty_like(q, (*shape, table.max_length), "float32")
    pages = empty_like(q, (*shape, -(-table.max_length // PAGE), 2), "float32")
    view = table_view(op, table)
    addresses = address(scores), address(pages)
    native.sparse_scores(native_codec(codec), shape, view_of(op, "q", q), view, scale, *addresses, get_num_threads())
    return Scores(scores, pages)


def page_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    op, shape = "page_scores", tuple(q.shape[:3])
    out = empty_like(q, (*shape, -(-table.max_length // PAGE)), "float32")
    views = view_of(op, "q", q), table_view(op, table)
    native.page_scores(native_codec(codec), shape, *views, scale, address(out), get_num_threads())
    return out


def _scored(op: str, scores: Scores) -> tuple[Any, ...]:
    *shape, length = scores.scores.shape
    return tuple(shape), length, flat(op, "scores", scores.scores), flat(op, "pages", scores.pages)


def sparse_threshold(
    scores: Scores, table: PageTable, top_k: Any | None, top_p: float | None, exact_lse: Any | None
) -> Threshold:
    op, like = "sparse_threshold", scores.scores
    shape = tuple(like.shape[:3])
    out = [empty_like(like, shape, dtype) for dtype in ("float32", "int32", "int32", "float32", "float32")]
    one = top_k if isinstance(top_k, int) else 0
    native.sparse_threshold(
        _scored(op, scores),
        flat(op, "table.lengths", table.lengths),
        0 if top_k is None or isinstance(top_k, int) else flat(op, "top_k", top_k),
        min(one, 2**31 - 1),
        top_p or 0.0,
        0 if exact_lse is None else flat(op, "exact_lse", exact_lse),
        *map(address, out),
        get_num_threads(),
    )
    return Threshold(*out)


def sparse_attention(
    scores: Scores, threshold: Threshold, codec: Codec, table: PageTable, other: tuple[Any, Any] | None
) -> tuple[Any, Any]:
    op, like = "sparse_attention", scores.scores
    shape = tuple(like.shape[:3])
    out, lse = empty_like(like, (*shape, codec.head_dim), "float32"), empty_like(like, shape, "float32")
    native.sparse_attention(
        native_codec(codec),
        _scored(op, scores),
        table_view(op, table),
        flat(op, "threshold.score", threshold.score),
        flat(op, "threshold.last", threshold.last),
        flat(op, "threshold.top", threshold.top),
        address(out),
        address(lse),
        get_num_threads(),
    )
    if other is None:
        return out, lse
    o, joined = merge(out, lse, *other)
    dtype = dtype_of(other[0])
    if is_torch(o):
        return o.to(other[0].dtype), joined
    return np.asarray(o, dtype), joined


def page_select(
    means: Any, codec: Codec, table: PageTable, most: int, top_p: float | None, exact_lse: Any | None
) -> tuple[Any, Any, Any]:
    """Pages are few, so NumPy does it, on the arrays' own memory."""
    given: list[Any] = [means, table.page_table, table.lengths, exact_lse]
    m, offsets, lengths, lse = [x.numpy() if is_torch(x) else x for x in given]
    (batch, q_heads, n, pages), kv_heads = m.shape, codec.kv_heads
    z = m.reshape(batch, kv_heads, q_heads // kv_heads * n, pages) + np.float32(math.log(PAGE))
    total = np.logaddexp.reduce(z, axis=-1)
    if lse is not None:
        total = np.logaddexp(total, lse.reshape(total.shape))
    z = z - np.where(total == -np.inf, np.float32(0), total)[..., None]
    order = np.argsort(-z.max(2, initial=-np.inf), axis=-1, kind="stable")[..., :most]
    used = np.broadcast_to(((lengths + PAGE - 1) // PAGE)[:, None], (batch, kv_heads))
    counts = np.minimum(used, most)
    if top_p is not None:
        share = np.exp(z)
        sums = np.cumsum(np.take_along_axis(share, order[:, :, None], -1), -1)
        left = share.sum(-1, keepdims=True) - np.concatenate([np.zeros_like(sums[..., :1]), sums[..., :-1]], -1)
        counts = np.minimum((left > 1 - top_p).any(2).sum(-1), used)
    read = np.zeros((batch, kv_heads, pages), np.bool_)
    np.put_along_axis(read, order, np.arange(most) < counts[..., None], -1)
    heads_at = codec.format.record_bytes * np.arange(kv_heads)[:, None]
    rows = np.broadcast_to(offsets[:, None, :pages], (batch, kv_heads, pages))
    chosen = np.take_along_axis(rows, order, -1) + heads_at
    found = chosen, (counts * PAGE).astype(np.int32), read
    if is_torch(means):
        found = tuple(map(sys.modules["torch"].from_numpy, found))
    return found
