"""The oracle's sparse attention on a batch of rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import reference
from ...codec.codec import Codec
from ...codec.spec import PAGE
from ...ops.arrays import dtype_of, from_numpy, to_numpy
from ...ops.table import PageTable, Scores, Threshold
from ...reference import sparse
from .rows import pages_of_row
from .scores import qk_scores


def sparse_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Scores:
    scores = qk_scores(q, codec, table, scale)
    return Scores(scores, from_numpy(sparse.page_statistics(to_numpy(scores)), q, "float32"))


def page_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    q64 = to_numpy(q).astype(np.float64)
    out = np.full((*q64.shape[:3], -(-table.max_length // PAGE)), -np.inf)
    for row in range(q64.shape[0]):
        pages, _ = pages_of_row("page_scores", codec, table, row)
        if len(pages):
            out[row, ..., : len(pages)] = sparse.page_scores(q64[row], pages, codec, scale)
    return from_numpy(out, q, "float32")


def sparse_threshold(
    scores: Scores, table: PageTable, top_k: Any | None, top_p: float | None, exact_lse: Any | None
) -> Threshold:
    s, lengths = to_numpy(scores.scores), to_numpy(table.lengths)
    exact = np.full(s.shape[:3], -np.inf) if exact_lse is None else to_numpy(exact_lse).astype(np.float64)
    given = top_k if top_k is None or isinstance(top_k, int) else to_numpy(top_k)
    budgets = None if given is None else np.broadcast_to(given, s.shape[1])
    out = np.zeros((5, *s.shape[:3]))
    for b, h, i in np.ndindex(*s.shape[:3]):
        k = None if budgets is None else int(budgets[h])
        out[:4, b, h, i] = sparse.sparse_threshold(s[b, h, i, : lengths[b]], k, top_p, float(exact[b, h, i]))
    out[4] = s.max(-1, initial=-np.inf)
    dtypes = ("float32", "int32", "int32", "float32", "float32")
    return Threshold(*(from_numpy(x, scores.scores, dtype) for x, dtype in zip(out, dtypes)))


def sparse_attention(
    scores: Scores, threshold: Threshold, codec: Codec, table: PageTable, other: tuple[Any, Any] | None
) -> tuple[Any, Any]:
    s, t, last = (to_numpy(x) for x in (scores.scores, threshold.score, threshold.last))
    out, lse = np.zeros((*s.shape[:3], codec.head_dim)), np.full(s.shape[:3], -np.inf)
    for b in range(s.shape[0]):
        records, length = pages_of_row("sparse_attention", codec, table, b)
        if length:
            _, v = reference.decode_pages(records, codec)
            keep = sparse.survivors(s[b, ..., :length], t[b], last[b])
            out[b], lse[b] = sparse.sparse_attention(s[b, ..., :length], keep, v[:, :length])
    if other is None:
        return from_numpy(out, scores.scores, "float32"), from_numpy(lse, scores.scores, "float32")
    o, joined = reference.merge([(out, lse), (to_numpy(other[0]), to_numpy(other[1]))])
    return from_numpy(o, other[0], dtype_of(other[0])), from_numpy(joined, other[1], "float32")


def page_select(
    means: Any, codec: Codec, table: PageTable, most: int, top_p: float | None, exact_lse: Any | None
) -> tuple[Any, Any, Any]:
    m, offsets, lengths = to_numpy(means), to_numpy(table.page_table), to_numpy(table.lengths)
    (batch, q_heads, n, pages), kv_heads = m.shape, codec.kv_heads
    lse = np.full((batch, q_heads, n), -np.inf) if exact_lse is None else to_numpy(exact_lse)
    chosen, tokens = np.zeros((batch, kv_heads, most), np.int64), np.zeros((batch, kv_heads), np.int32)
    read = np.zeros((batch, kv_heads, pages), np.bool_)
    for b, h in np.ndindex(batch, kv_heads):
        heads = slice(h * q_heads // kv_heads, (h + 1) * q_heads // kv_heads)
        order, count = sparse.page_select(m[b, heads], lse[b, heads], -(-int(lengths[b]) // PAGE), most, top_p)
        chosen[b, h] = offsets[b, order[:most]] + h * codec.format.record_bytes
        tokens[b, h], read[b, h, order[:count]] = count * PAGE, True
    return from_numpy(chosen, means, "int64"), from_numpy(tokens, means, "int32"), from_numpy(read, means, "bool")
