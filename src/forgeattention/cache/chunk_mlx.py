"""Attention of prompt chunks in MLX."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..ops.exact_mlx import attention

if TYPE_CHECKING:
    from .layer import LayerCache

BLOCK = 256
"""Queries whose scores are held at a time."""


def chunk(
    past: LayerCache,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    keep: NDArray[np.bool_] | None,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    """Attention of a chunk of new tokens over the past and, causally, over itself.

    MLX's fused attention gives no log-sum-exp, so it serves only where nothing is packed yet.

    Args:
        past: the cache, without the new tokens.
        q: [batch, q_heads, m, head_dim], the queries of the last m new tokens.
        k, v: [batch, kv_heads, n, head_dim].
        keep: bool [batch, n], which tokens are real; None for all.
        scale: softmax scale.
        sinks: extra logits [q_heads], or None.

    Returns:
        [batch, q_heads, m, head_dim] in q's dtype; zeros where nothing is attended.
    """
    held, m, n = past.exact.max_length, q.shape[2], k.shape[2]
    exact_k, exact_v = past.exact.k[:, :, :held], past.exact.v[:, :, :held]
    keys, values = (mx.concatenate(pair, axis=2) for pair in ((exact_k, k), (exact_v, v)))
    lengths = past.exact_lengths
    ragged = keep is not None or bool((lengths != held).any())
    if past.table is None and not ragged:
        mask = "causal" if m > 1 else None
        logits = None if sinks is None else sinks.astype(q.dtype)
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask, sinks=logits)
    visible = np.ones((past.batch, held + n), np.bool_)
    visible[:, :held] = np.arange(held) < lengths[:, None]
    if keep is not None:
        visible[:, held:] = keep
    parts = []
    for start in range(0, m, BLOCK):
        stop = min(start + BLOCK, m)
        end = held + n - m + stop
        causal = np.arange(end) <= np.arange(held + n - m + start, end)[:, None]
        mask = mx.array(visible[:, None, :end] & causal)
        parts.append(attention(q[:, :, start:stop], keys[:, :, :end], values[:, :, :end], mask, scale))
    o, lse = (mx.concatenate(x, axis=2) for x in zip(*parts))
    if past.table is not None:
        o, lse = ops.merge(*ops.prefill_attention(q, past.codec, past.table, scale, backend=past.backend), o, lse)
    if sinks is not None:
        o = o * mx.sigmoid(lse - sinks.astype(mx.float32)[:, None])[..., None]
    return o.astype(q.dtype)
