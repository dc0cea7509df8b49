"""sparse_scores, sparse_threshold, sparse_attention, page_scores, page_select: attention over the tokens that matter.

The first three are one step in three launches: scores of all packed tokens, from them a threshold per query, then the
values of the tokens that reach it. The other two choose whole pages by the score of their mean key. Nothing of it waits
for the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..codec.codec import Codec
from ..codec.spec import PAGE
from .arrays import Array, device_of, dtype_of, empty_like, from_numpy
from .checks import (
    check_codec,
    check_index,
    check_packed_queries,
    check_table,
    describe,
    fail,
)
from .decorator import op
from .registry import launch
from .table import PageTable, Scores, Threshold


def _scores_fake(q: Any, codec: Codec, table: PageTable, scale: float) -> Scores:
    pages = -(-table.max_length // PAGE)
    # On CUDA the scores lie in rows of whole pages.
    length = pages * PAGE if device_of(q) == "cuda" else table.max_length
    scores = empty_like(q, (*q.shape[:3], length), "float32")
    return Scores(scores[..., : table.max_length], empty_like(q, (*q.shape[:3], pages, 2), "float32"))


def _page_scores_fake(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    return empty_like(q, (*q.shape[:3], -(-table.max_length // PAGE)), "float32")


def _threshold_fake(scores: Scores, *_: Any, **__: Any) -> Threshold:
    shape = scores.scores.shape[:3]
    dtypes = "float32", "int32", "int32", "float32", "float32"
    return Threshold(*(empty_like(scores.scores, shape, dtype) for dtype in dtypes))


def _attention_fake(
    scores: Scores, threshold: Threshold, codec: Codec, table: PageTable, *, other: tuple[Any, Any] | None
) -> tuple[Any, Any]:
    shape = scores.scores.shape[:3]
    dtype = "float32" if other is None else dtype_of(other[0])
    return (
        empty_like(scores.scores, (*shape, codec.head_dim), dtype),
        empty_like(scores.scores, shape, "float32"),
    )


def _page_select_fake(
    means: Any, codec: Codec, table: PageTable, *, top_k: int | None, top_p: float | None, exact_lse: Any
) -> tuple[Any, Any, Any]:
    batch, _, _, pages = means.shape
    heads = batch, codec.kv_heads
    most = pages if top_k is None else min(top_k, pages)
    return (
        empty_like(means, (*heads, most), "int64"),
        empty_like(means, heads, "int32"),
        empty_like(means, (*heads, pages), "bool"),
    )


@op(fake=_scores_fake)
def sparse_scores(q: Array, codec: Codec, table: PageTable, scale: float, *, backend: str = "auto") -> Scores:
    """Scaled scores of all packed tokens, and each page's largest one.

    Args:
        q: [batch, q_heads, n, head_dim], float32, float16 or bfloat16.
        codec: the layer's codec.
        table: the packed tokens.
        scale: softmax scale.
        backend: "auto" or a backend's name.
    """
    op = "sparse_scores"
    scale = check_packed_queries(op, q, codec, table, scale)
    return launch(op, q, backend)(q, codec, table, scale)


@op(fake=_page_scores_fake)
def page_scores(q: Array, codec: Codec, table: PageTable, scale: float, *, backend: str = "auto") -> Array:
    """Scaled scores of the mean key of each page, which is all that is read of it.

    Args:
        q: [batch, q_heads, n, head_dim], float32, float16 or bfloat16.
        codec: the layer's codec.
        table: the packed tokens.
        scale: softmax scale.
        backend: "auto" or a backend's name.

    Returns:
        float32 [batch, q_heads, n, pages], -inf past a row's last page.
    """
    op = "page_scores"
    scale = check_packed_queries(op, q, codec, table, scale)
    return launch(op, q, backend)(q, codec, table, scale)


@op(fake=_threshold_fake)
def sparse_threshold(
    scores: Scores,
    table: PageTable,
    *,
    top_k: int | Array | None = None,
    top_p: float | None = None,
    exact_lse: Array | None = None,
    backend: str = "auto",
) -> Threshold:
    """The exact threshold of each query; ties go to the earlier token.

    With `top_p` the dropped mass is at most 1 - top_p, so that |o - o_dense| <= 2 (1 - top_p) max|v| in every channel:
    o_dense = (1 - d) o + d o_dropped with a dropped mass d, hence o - o_dense = d (o - o_dropped).

    Args:
        scores: of `sparse_scores`.
        table: the same packed tokens.
        top_k: keep so many tokens of each query: one number, or int32 [q_heads] on the scores' device.
        top_p: or keep the fewest tokens, largest scores first, that together with the exact ones carry this share of
            the softmax mass, in (0, 1).
        exact_lse: float32 [batch, q_heads, n], natural log-sum-exp of the tokens that are attended anyway; None for
            none.
        backend: "auto" or a backend's name.

    Raises:
        ValueError: both or neither of `top_k` and `top_p`, a number out of range, or shapes that do not fit.
    """
    op = "sparse_threshold"
    shape = _check_scores(op, scores, table)
    if (top_k is None) == (top_p is None):
        raise fail(op, "either top_k or top_p", f"{describe(top_k)} and {top_p}")
    if top_p is not None and not 0 < top_p < 1:
        raise fail(op, "0 < top_p < 1", top_p)
    if isinstance(top_k, int):
        if top_k < 0:
            raise fail(op, "top_k >= 0", top_k)
    elif top_k is not None:
        check_index(op, "top_k", top_k, "int32", (shape[1],))
    if exact_lse is not None:
        check_index(op, "exact_lse", exact_lse, "float32", shape[:3])
    return launch(op, scores.scores, backend)(scores, table, top_k, top_p, exact_lse)


@op(fake=_attention_fake)
def sparse_attention(
    scores: Scores,
    threshold: Threshold,
    codec: Codec,
    table: PageTable,
    *,
    other: tuple[Array, Array] | None = None,
    backend: str = "auto",
) -> tuple[Array, Array]:
    """Attention over the tokens that reach their query's threshold. Pages without one are not read.

    Args:
        scores: of `sparse_scores`.
        threshold: of `sparse_threshold`.
        codec: the layer's codec.
        table: the same packed tokens.
        other: attention over disjoint tokens to be joined: o [batch, q_heads, n, head_dim] and lse float32
            [batch, q_heads, n].
        backend: "auto" or a backend's name.

    Returns:
        out [batch, q_heads, n, head_dim], in the dtype of `other`'s o or float32, and lse float32
        [batch, q_heads, n]; zeros and -inf where nothing is attended.
    """
    op = "sparse_attention"
    check_codec(op, codec)
    shape = _check_scores(op, scores, table)
    if shape[1] == 0 or shape[1] % codec.kv_heads:
        raise fail(op, f"q_heads a multiple of {codec.kv_heads} kv_heads", shape[1])
    check_index(op, "threshold.score", threshold.score, "float32", shape[:3])
    check_index(op, "threshold.last", threshold.last, "int32", shape[:3])
    if other is not None:
        check_index(op, "other's lse", other[1], "float32", shape[:3])
        if tuple(other[0].shape) != (*shape[:3], codec.head_dim):
            raise fail(op, f"other's o {[*shape[:3], codec.head_dim]}", list(other[0].shape))
    return launch(op, scores.scores, backend)(scores, threshold, codec, table, other)


@op(fake=_page_select_fake)
def page_select(
    means: Array,
    codec: Codec,
    table: PageTable,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    exact_lse: Array | None = None,
    backend: str = "auto",
) -> tuple[Array, Array, Array]:
    """The pages that each KV head reads: those to which any of its queries is estimated to give the largest share.

    64 exp(score of a page's mean) estimates, from below, the mass that a query gives to the page.

    Args:
        means: of `page_scores`, float32 [batch, q_heads, n, pages].
        codec: the layer's codec.
        table: the packed tokens, whole pages.
        top_k: choose so many pages of each KV head.
        top_p: or choose the fewest pages, largest first, that together with the exact tokens carry this share of every
            query's estimated mass, in (0, 1).
        exact_lse: float32 [batch, q_heads, n], natural log-sum-exp of the tokens that are attended anyway; None for
            none.
        backend: "auto" or a backend's name.

    Returns:
        Byte offsets of the chosen records int64 [batch, kv_heads, m], tokens in them int32 [batch, kv_heads], and
        which pages they are, bool [batch, kv_heads, pages]; m is top_k or the number of pages, if that is less.

    Raises:
        ValueError: both or neither of `top_k` and `top_p`, a number out of range, or shapes that do not fit.
    """
    name = "page_select"
    check_codec(name, codec)
    if not device_of(means) or dtype_of(means) != "float32" or len(means.shape) != 4:
        raise fail(name, "means float32 [batch, q_heads, n, pages]", describe(means))
    batch, q_heads, n, pages = means.shape
    if q_heads == 0 or q_heads % codec.kv_heads:
        raise fail(name, f"q_heads a multiple of {codec.kv_heads} kv_heads", q_heads)
    check_table(name, table, batch, means)
    if pages != -(-table.max_length // PAGE):
        raise fail(name, f"means of the {-(-table.max_length // PAGE)} pages of the table", pages)
    if (top_k is None) == (top_p is None):
        raise fail(name, "either top_k or top_p", f"{top_k} and {top_p}")
    if top_k is not None and top_k < 0:
        raise fail(name, "top_k >= 0", top_k)
    if top_p is not None and not 0 < top_p < 1:
        raise fail(name, "0 < top_p < 1", top_p)
    if exact_lse is not None:
        check_index(name, "exact_lse", exact_lse, "float32", (batch, q_heads, n))
    most = pages if top_k is None else min(top_k, pages)
    run = launch(name, means, backend)
    if 0 in means.shape:  # without queries, or without pages, none is read
        heads = batch, codec.kv_heads
        empty = ((*heads, most), "int64"), (heads, "int32"), ((*heads, pages), "bool")
        offsets, tokens, read = (from_numpy(np.zeros(shape, dtype), means, dtype) for shape, dtype in empty)
        return offsets, tokens, read
    return run(means, codec, table, most, top_p, exact_lse)


def _check_scores(op: str, scores: Any, table: Any) -> tuple[int, ...]:
    if not isinstance(scores, Scores):
        raise fail(op, "Scores", type(scores).__name__)
    s = scores.scores
    if not device_of(s) or dtype_of(s) != "float32" or len(s.shape) != 4:
        raise fail(op, "scores float32 [batch, q_heads, n, max_length]", describe(s))
    check_table(op, table, s.shape[0], s)
    shape = tuple(s.shape)
    pages = (*shape[:3], -(-table.max_length // PAGE), 2)
    if shape[3] != table.max_length or tuple(scores.pages.shape) != pages:
        raise fail(op, f"scores of {table.max_length} tokens and pages {list(pages)}", describe(scores.pages))
    return shape
