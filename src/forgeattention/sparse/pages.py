"""Reading whole pages, chosen by the score of their mean key.

A page's mean key stands in its record and costs 1 / 64 of its bytes or less. 64 exp(score of the mean) estimates the
mass of the page's tokens, from below: their spread around the mean adds to it. What the estimate misses is not known
without reading, so nothing is bounded here. A row's packed tokens must fill their pages, as they do in
`cache.LayerCache`.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from .. import ops
from ..codec import PAGE, Codec
from ..ops.arrays import is_mlx, is_torch, to_numpy
from ..ops.table import ExactTokens, PageTable
from .spec import SparseSpec

_heads: WeakKeyDictionary[Codec, list[Codec]] = WeakKeyDictionary()


def attend_pages(
    q: Any,
    codec: Codec,
    table: PageTable,
    exact: ExactTokens,
    scale: float,
    causal: bool,
    sinks: Any | None,
    spec: SparseSpec,
    backend: str,
) -> tuple[Any, Any, Any, Any]:
    """Attention over the exact tokens and the chosen pages of each KV head, whole ones all.

    Returns:
        out and lse as `ops.decode_attention`; which pages were read, bool [batch, kv_heads, pages]; the scores of the
        pages' means, float32 [batch, q_heads, n, pages].
    """
    means = ops.page_scores(q, codec, table, scale, backend=backend)
    lse = None
    if spec.top_p is not None:
        _, lse = ops.decode_attention(q, codec, None, exact, scale, causal=causal, sink_logits=sinks, backend=backend)
    top_k = None if spec.top_k is None else spec.top_k // PAGE
    offsets, tokens, read = ops.page_select(
        means, codec, table, top_k=top_k, top_p=spec.top_p, exact_lse=lse, backend=backend
    )
    out, lse = _attend_rows(q, codec, table, offsets, tokens, exact, scale, causal, backend)
    if sinks is not None:
        extra = sinks[None, :, None] + lse * 0
        out, lse = ops.merge(out, lse, out * 0, extra)
    return out, lse, read, means


def estimated_drop(means: Any, read: Any, lse: Any) -> Any:
    """The share of each query's mass that unread pages are estimated to hold, float64 [batch, q_heads, n], on the host.

    Args:
        means, read: of `attend_pages`.
        lse: log-sum-exp of what was attended, [batch, q_heads, n].
    """
    m, r, whole = (to_numpy(x) for x in (means, read, lse))
    unread = np.where(np.repeat(r, m.shape[1] // r.shape[1], 1)[:, :, None], -np.inf, m.astype(np.float64))
    missed = np.exp(unread + math.log(PAGE) - whole[..., None]).sum(-1)
    return missed / (1 + missed)


def _attend_rows(
    q: Any,
    codec: Codec,
    table: PageTable,
    offsets: Any,
    tokens: Any,
    exact: ExactTokens,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Any, Any]:
    """Dense attention with a page table for each KV head: a KV head is a row of its own."""
    batch, heads, n, dim = q.shape
    kv_heads, group = codec.kv_heads, heads // codec.kv_heads
    most = offsets.shape[2]
    if codec not in _heads:
        _heads[codec] = [codec.head(h) for h in range(kv_heads)]
    own = _heads[codec]
    if _alike(codec):
        rows = batch * kv_heads
        of_rows = PageTable(table.base, offsets.reshape(rows, most), tokens.reshape(rows), most * PAGE)
        if is_torch(q):
            lengths = exact.lengths.repeat_interleave(kv_heads)
        elif is_mlx(q):
            import mlx.core as mx

            lengths = mx.repeat(exact.lengths, kv_heads)
        else:
            lengths = exact.lengths.repeat(kv_heads)
        cap = exact.k.shape[2]
        k, v = (x.reshape(rows, 1, cap, dim) for x in (exact.k, exact.v))
        held = ExactTokens(k, v, lengths, exact.max_length)
        queries = q.reshape(rows, group, n, dim)
        out, lse = ops.decode_attention(queries, own[0], of_rows, held, scale, causal=causal, backend=backend)
        return out.reshape(q.shape), lse.reshape(batch, heads, n)
    parts = []
    for h in range(kv_heads):
        of_head = PageTable(table.base, offsets[:, h], _flat(tokens[:, h]), most * PAGE)
        one = slice(h, h + 1)
        held = ExactTokens(exact.k[:, one], exact.v[:, one], exact.lengths, exact.max_length)
        queries = q[:, h * group : (h + 1) * group]
        parts.append(ops.decode_attention(queries, own[h], of_head, held, scale, causal=causal, backend=backend))
    return _concat([out for out, _ in parts], 1), _concat([lse for _, lse in parts], 1)


def _alike(codec: Codec) -> bool:
    """Whether all heads share their transforms."""
    sides = (codec.k_transform, codec.v_transform)
    return all(len(t.forward) == 1 and (t.mu is None or len(t.mu) == 1) for t in sides)


def _flat(x: Any) -> Any:
    return x.contiguous() if is_torch(x) else np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x + 0


def _concat(parts: list[Any], axis: int) -> Any:
    if is_torch(parts[0]):
        import torch

        return torch.cat(parts, axis)
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis)
    import mlx.core as mx

    return mx.concatenate(parts, axis)
