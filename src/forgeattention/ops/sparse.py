"""sparse_scores, sparse_threshold, sparse_attention, page_scores: attention over the packed tokens that matter.

The first three are one step in three launches: scores of all packed tokens, from them a threshold per query, then the
values of the tokens that reach it. Nothing of it waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..codec.codec import Codec
from ..codec.spec import PAGE
from .arrays import device_of, dtype_of
from .checks import check_codec, check_index, check_queries, check_scale, check_table, describe, fail
from .dispatch import select
from .table import PageTable


@dataclass(frozen=True, eq=False)
class Scores:
    """All scores of a step.

    Attributes:
        scores: float32 [batch, q_heads, n, max_length], -inf from each row's length on.
        pages: float32 [batch, q_heads, n, pages, 2], of every 64 tokens the largest score m and the sum of
            exp(score - m); -inf and 0 for a page without tokens.
    """

    scores: Any
    pages: Any


@dataclass(frozen=True, eq=False)
class Threshold:
    """Which tokens each query keeps: those with larger scores, and of those with just this score the ones up to a
    position.

    Attributes:
        score: float32 [batch, q_heads, n]; inf where nothing is kept.
        last: int32 [batch, q_heads, n], position; -1 where nothing is kept.
        kept: int32 [batch, q_heads, n], how many tokens that are.
        dropped: float32 [batch, q_heads, n], the other packed tokens' share of the softmax mass, exact tokens included
            in the whole.
        top: float32 [batch, q_heads, n], the largest score; -inf without packed tokens.
    """

    score: Any
    last: Any
    kept: Any
    dropped: Any
    top: Any


def sparse_scores(q: Any, codec: Codec, table: PageTable, scale: float, *, backend: str = "auto") -> Scores:
    """Scaled scores of all packed tokens, and each page's largest one.

    Args:
        q: [batch, q_heads, n, head_dim], float32, float16 or bfloat16.
        codec: the layer's codec.
        table: the packed tokens.
        scale: softmax scale.
        backend: "auto" or a backend's name.
    """
    op = "sparse_scores"
    check_codec(op, codec)
    check_queries(op, q, codec)
    scale = check_scale(op, scale)
    check_table(op, table, q.shape[0], q)
    return select(op, q, backend)(q, codec, table, scale)


def page_scores(q: Any, codec: Codec, table: PageTable, scale: float, *, backend: str = "auto") -> Any:
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
    check_codec(op, codec)
    check_queries(op, q, codec)
    scale = check_scale(op, scale)
    check_table(op, table, q.shape[0], q)
    return select(op, q, backend)(q, codec, table, scale)


def sparse_threshold(
    scores: Scores,
    table: PageTable,
    *,
    top_k: int | Any | None = None,
    top_p: float | None = None,
    exact_lse: Any | None = None,
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
    return select(op, scores.scores, backend)(scores, table, top_k, top_p, exact_lse)


def sparse_attention(
    scores: Scores,
    threshold: Threshold,
    codec: Codec,
    table: PageTable,
    *,
    other: tuple[Any, Any] | None = None,
    backend: str = "auto",
) -> tuple[Any, Any]:
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
    return select(op, scores.scores, backend)(scores, threshold, codec, table, other)


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
