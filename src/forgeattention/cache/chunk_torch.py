"""Attention of prompt chunks in torch: its own kernels for exact tokens, `ops.prefill_attention` for packed ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from .. import ops
from ..ops.table import ExactTokens, PageTable

if TYPE_CHECKING:
    from .layer import LayerCache

Part = tuple[torch.Tensor, torch.Tensor]


def flash(q: torch.Tensor) -> bool:
    """Whether torch's flash attention takes these queries on CUDA. It reads grouped heads as they are, and its causal
    mask is aligned to the last query and key."""
    return q.is_cuda and q.dtype != torch.float32 and q.shape[-1] <= 256


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    bias: torch.Tensor | None = None,
) -> Part:
    """Attention by torch's own kernels, with the log-sum-exp.

    Args:
        q: [batch, q_heads, n, head_dim].
        k, v: [batch, kv_heads, tokens, head_dim], at least one token.
        scale: softmax scale.
        causal: token i is seen by queries from i on.
        bias: added to the scores, [batch or 1, q_heads or 1, n, tokens] in q's dtype, or None.

    Returns:
        o [batch, q_heads, n, head_dim] in q's dtype and the natural log-sum-exp float32 [batch, q_heads, n].

    Raises:
        ValueError: a device other than the CPU or CUDA.
    """
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    if q.device.type != "cuda":
        raise ValueError(f"[cache] expected tensors on the CPU or CUDA; got {q.device}")
    if bias is None and flash(q):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if bias is not None:
        # The kernel wants rows of the bias at multiples of 16 bytes.
        tokens = bias.shape[-1]
        padded = bias.new_empty(*q.shape[:3], -(-tokens // 8) * 8)[..., :tokens]
        bias = padded.copy_(bias)
    o, lse = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scale)[:2]
    return o, lse[..., : q.shape[2]]


def chunk(
    past: LayerCache,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: NDArray[np.bool_] | None,
    scale: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of a chunk of new tokens over the past and, causally, over itself.

    Args:
        past: the cache, without the new tokens.
        q: [batch, q_heads, m, head_dim], the queries of the last m new tokens.
        k, v: [batch, kv_heads, n, head_dim].
        keep: bool [batch, n], which tokens are real; None for all.
        scale: softmax scale.
        sinks: extra logits float32 [q_heads], or None.

    Returns:
        [batch, q_heads, m, head_dim] in q's dtype: for a padded query what it sees of the real tokens before it, zero
        where there are none.
    """
    if keep is None and past.rows.uniform:
        return _chunk(past, past.table, past.exact, q, k, v, scale, sinks)
    out = torch.zeros_like(q)
    for row in range(past.batch):
        rows = slice(row, row + 1)
        if keep is None:
            out[rows] = _chunk(past, *past.row(row), q[rows], k[rows], v[rows], scale, sinks)
            continue
        real, first = np.flatnonzero(keep[row]), k.shape[2] - q.shape[2]
        rk, rv = (x[rows].index_select(2, torch.from_numpy(real).to(q.device)) for x in (k, v))
        asked = keep[row, first:]
        if asked.any():
            at = torch.from_numpy(np.flatnonzero(asked)).to(q.device)
            out[rows, :, at] = _chunk(past, *past.row(row), q[rows].index_select(2, at), rk, rv, scale, sinks)
        # transformers' prompts padded on the right go on from what the last padded query gives.
        for start, stop in _runs_of(~asked):
            before = int(np.searchsorted(real, first + start))
            if before or past.lengths[row]:
                pk, pv = (x[:, :, :before] for x in (rk, rv))
                out[rows, :, start:stop] = _seen_by_padding(past, row, q[rows, :, start:stop], pk, pv, scale, sinks)
    return out


def _runs_of(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Start and stop of every run of true flags."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _seen_by_padding(
    past: LayerCache,
    row: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of a run of padded queries of one row over its past and all of the given new tokens, perhaps none."""
    table, exact = past.row(row)
    k, v = (torch.cat([x[:, :, : exact.max_length], y], 2) for x, y in ((exact.k, k), (exact.v, v)))
    packed = past.attend_packed(q, table, scale)
    if not k.shape[2]:
        assert packed is not None  # padding that sees no token at all does not come here
        o, lse = packed
    else:
        o, lse = attention(q, k, v, scale)
        if packed is not None:
            o, lse = ops.merge(o.float(), lse, *packed)
    return with_sinks(o, lse, sinks).to(q.dtype)


def _chunk(
    past: LayerCache,
    table: PageTable | None,
    exact: ExactTokens,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    return attend(q, k, v, exact, past.attend_packed(q, table, scale), scale, sinks)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    exact: ExactTokens | None,
    packed: Part | None,
    scale: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of new tokens over exact past ones and, causally, over themselves, joined with that over packed ones.

    Args:
        q: [batch, q_heads, m, head_dim], the queries of the last m new tokens.
        k, v: [batch, kv_heads, n, head_dim].
        exact: past tokens, in every row `max_length` of them; None for none.
        packed: what the packed past gave, or None.
        scale: softmax scale.
        sinks: extra logits float32 [q_heads], or None.

    Returns:
        [batch, q_heads, m, head_dim] in q's dtype.
    """
    m, n = q.shape[2], k.shape[2]
    past = [x[:, :, : exact.max_length] for x in (exact.k, exact.v)] if exact is not None and exact.max_length else None
    bias = None
    if flash(q):
        if past is not None:
            k, v = (torch.cat(both, 2) for both in zip(past, (k, v)))
    elif 1 < m < n:
        bias = q.new_full((1, 1, m, n), -torch.inf).triu_(n - m + 1)
    o, lse = attention(q, k, v, scale, causal=m == n or flash(q), bias=bias)
    if past is not None and not flash(q):
        o, lse = ops.merge(o.float(), lse, *attention(q, past[0], past[1], scale))
    if packed is not None:
        # The result is in the first part's dtype; sinks want it before it is rounded.
        o, lse = ops.merge(o if sinks is None else o.float(), lse, *packed)
    return with_sinks(o, lse, sinks).to(q.dtype)


def with_sinks(o: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Gives part of the probability mass to extra logits [q_heads] without a value (gpt-oss's attention sinks)."""
    return o if sinks is None else o * torch.sigmoid(lse - sinks[:, None])[..., None]
