"""Reading whole pages, chosen by the score of their mean key.

A page's mean key stands in its record and costs 1 / 64 of its bytes or less. 64 exp(score of the mean) estimates the
mass of the page's tokens, from below: their spread around the mean adds to it. What the estimate misses is not known
without reading, so nothing is bounded here.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from .. import ops
from ..codec import PAGE, Codec
from ..ops.arrays import from_numpy, is_torch, to_numpy
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
        out and lse as `ops.decode_attention`; which pages were read, bool [batch, kv_heads, pages]; the estimated share
        of the mass that was not, float32 [batch, q_heads, n].
    """
    means = ops.page_scores(q, codec, table, scale, backend=backend)
    lse = None
    if spec.top_p is not None:
        _, lse = ops.decode_attention(q, codec, None, exact, scale, causal=causal, sink_logits=sinks, backend=backend)
    if is_torch(q):
        order, counts, read, dropped = _choose_torch(means, codec.kv_heads, table.lengths, lse, spec)
    else:
        arrays = [to_numpy(x) for x in (means, table.lengths)]
        chosen = _choose(arrays[0], codec.kv_heads, arrays[1], None if lse is None else to_numpy(lse), spec)
        order, counts, read, dropped = (
            from_numpy(x, q, dtype) for x, dtype in zip(chosen, ("int64", "int32", "bool", "float32"))
        )
    out, lse = _attend_rows(q, codec, table, order, counts, exact, scale, causal, backend)
    if sinks is not None:
        extra = sinks[None, :, None] + lse * 0
        out, lse = ops.merge(out, lse, out * 0, extra)
    return out, lse, read, dropped


def _choose_torch(means: Any, kv_heads: int, lengths: Any, lse: Any | None, spec: SparseSpec) -> tuple[Any, ...]:
    """See `_choose`; nothing waits for the device."""
    import torch

    batch, heads, n, pages = means.shape
    z = means.reshape(batch, kv_heads, -1, pages) + math.log(PAGE)
    total = z.logsumexp(-1)
    if lse is not None:
        total = torch.logaddexp(total, lse.reshape(total.shape))
    z = z - total[..., None]
    rank = z.amax(2)
    used = ((lengths + PAGE - 1) // PAGE)[:, None]
    share = z.exp()
    if spec.top_k is not None:
        most = min(spec.top_k // PAGE, pages)
        order = rank.topk(most).indices
        counts = used.clamp(max=most).expand(batch, kv_heads)
        covered = share.gather(-1, order[:, :, None].expand(-1, -1, share.shape[2], -1)).sum(-1)
    else:
        order = rank.sort(-1, descending=True).indices
        sums = share.gather(-1, order[:, :, None].expand_as(share)).cumsum(-1)
        left = share.sum(-1, keepdim=True) - torch.nn.functional.pad(sums, (1, 0))
        counts = (left[..., :-1] > 1 - spec.top_p).any(2).sum(-1)  # type: ignore[operator]
        counts = torch.minimum(counts, used)
        at = counts[:, :, None, None].expand(-1, -1, share.shape[2], 1)
        covered = share.sum(-1) - left.gather(-1, at)[..., 0]
    taken = torch.arange(order.shape[-1], device=order.device) < counts[..., None]
    read = torch.zeros((batch, kv_heads, pages), dtype=torch.bool, device=means.device).scatter(-1, order, taken)
    dropped = (share.sum(-1) - covered).reshape(batch, heads, n).clamp(min=0)
    return order, counts.to(torch.int32), read, dropped


def _choose(means: Any, kv_heads: int, lengths: Any, lse: Any | None, spec: SparseSpec) -> tuple[Any, ...]:
    """Pages in the order of the largest share that any query of the KV head is estimated to give them.

    Args:
        means: scores of the pages' means, float32 [batch, q_heads, n, pages].
        kv_heads: KV heads.
        lengths: packed tokens of each row, [batch].
        lse: log-sum-exp of the exact tokens [batch, q_heads, n]; None leaves them out of the whole.
        spec: how many pages, or up to which estimated share for every query.

    Returns:
        page numbers [batch, kv_heads, most], how many of them are read [batch, kv_heads], which pages that are, bool
        [batch, kv_heads, pages], and the estimated share of the others [batch, q_heads, n].
    """
    import torch

    given = [None if x is None else torch.from_numpy(np.ascontiguousarray(x)) for x in (means, lengths, lse)]
    return tuple(x.numpy() for x in _choose_torch(given[0], kv_heads, given[1], given[2], spec))


def _attend_rows(
    q: Any,
    codec: Codec,
    table: PageTable,
    order: Any,
    counts: Any,
    exact: ExactTokens,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Any, Any]:
    """Dense attention with a page table for each KV head: a KV head is a row of its own."""
    batch, heads, n, dim = q.shape
    kv_heads, group, record = codec.kv_heads, heads // codec.kv_heads, codec.format.record_bytes
    most = order.shape[2]
    offsets = table.offsets
    if is_torch(q):
        import torch

        offsets = offsets[:, None].expand(-1, kv_heads, -1).gather(-1, order)
        offsets = offsets + record * torch.arange(kv_heads, device=offsets.device)[:, None]
    else:
        o, pages = to_numpy(table.offsets), to_numpy(order)
        host = np.take_along_axis(np.broadcast_to(o[:, None], (batch, kv_heads, o.shape[1])), pages, -1)
        offsets = from_numpy(host + record * np.arange(kv_heads)[:, None], table.offsets, "int64")
    tokens = counts * PAGE
    if codec not in _heads:
        _heads[codec] = [codec.head(h) for h in range(kv_heads)]
    own = _heads[codec]
    if _alike(codec):
        rows = batch * kv_heads
        of_rows = PageTable(table.base, offsets.reshape(rows, most), tokens.reshape(rows), most * PAGE)
        lengths = exact.lengths.repeat_interleave(kv_heads) if is_torch(q) else exact.lengths.repeat(kv_heads)
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
