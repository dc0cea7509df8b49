"""Sparse attention by the native CPU kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..codec.codec import Codec
from ..codec.spec import PAGE
from ..ops.arrays import dtype_of, empty_like, is_torch
from ..ops.merge import merge
from ..ops.sparse import Scores, Threshold
from ..ops.table import PageTable
from ..ops.threads import get_num_threads
from . import cpu


def sparse_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Scores:
    op, shape = "sparse_scores", tuple(q.shape[:3])
    scores = empty_like(q, (*shape, table.max_length), "float32")
    pages = empty_like(q, (*shape, -(-table.max_length // PAGE), 2), "float32")
    view = cpu._table(op, table)
    addresses = cpu._address(scores), cpu._address(pages)
    cpu._native.sparse_scores(
        cpu._native_codec(codec), shape, cpu._view(op, "q", q), view, scale, *addresses, get_num_threads()
    )
    return Scores(scores, pages)


def page_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    op, shape = "page_scores", tuple(q.shape[:3])
    out = empty_like(q, (*shape, -(-table.max_length // PAGE)), "float32")
    views = cpu._view(op, "q", q), cpu._table(op, table)
    cpu._native.page_scores(cpu._native_codec(codec), shape, *views, scale, cpu._address(out), get_num_threads())
    return out


def _scored(op: str, scores: Scores) -> tuple[Any, ...]:
    *shape, length = scores.scores.shape
    return tuple(shape), length, cpu._flat(op, "scores", scores.scores), cpu._flat(op, "pages", scores.pages)


def sparse_threshold(
    scores: Scores, table: PageTable, top_k: Any | None, top_p: float | None, exact_lse: Any | None
) -> Threshold:
    op, like = "sparse_threshold", scores.scores
    shape = tuple(like.shape[:3])
    out = [empty_like(like, shape, dtype) for dtype in ("float32", "int32", "int32", "float32", "float32")]
    one = top_k if isinstance(top_k, int) else 0
    cpu._native.sparse_threshold(
        _scored(op, scores),
        cpu._flat(op, "table.lengths", table.lengths),
        0 if top_k is None or isinstance(top_k, int) else cpu._flat(op, "top_k", top_k),
        min(one, 2**31 - 1),
        top_p or 0.0,
        0 if exact_lse is None else cpu._flat(op, "exact_lse", exact_lse),
        *map(cpu._address, out),
        get_num_threads(),
    )
    return Threshold(*out)


def sparse_attention(
    scores: Scores, threshold: Threshold, codec: Codec, table: PageTable, other: tuple[Any, Any] | None
) -> tuple[Any, Any]:
    op, like = "sparse_attention", scores.scores
    shape = tuple(like.shape[:3])
    out, lse = empty_like(like, (*shape, codec.head_dim), "float32"), empty_like(like, shape, "float32")
    cpu._native.sparse_attention(
        cpu._native_codec(codec),
        _scored(op, scores),
        cpu._table(op, table),
        cpu._flat(op, "threshold.score", threshold.score),
        cpu._flat(op, "threshold.last", threshold.last),
        cpu._flat(op, "threshold.top", threshold.top),
        cpu._address(out),
        cpu._address(lse),
        get_num_threads(),
    )
    if other is None:
        return out, lse
    o, joined = merge(out, lse, *other)
    dtype = dtype_of(other[0])
    if is_torch(o):
        return o.to(other[0].dtype), joined
    return np.asarray(o, dtype), joined
