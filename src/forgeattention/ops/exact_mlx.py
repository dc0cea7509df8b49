"""Attention over unpacked keys and values in MLX's own operations, with its log-sum-exp."""

from __future__ import annotations

import mlx.core as mx


def attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array, scale: float) -> tuple[mx.array, mx.array]:
    """Attention with its log-sum-exp, in float32.

    Args:
        q: [batch, q_heads, n, head_dim].
        k, v: [batch, kv_heads, tokens, head_dim].
        mask: bool [batch, n, tokens], True where attended.
        scale: softmax scale.

    Returns:
        o [batch, q_heads, n, head_dim] and the natural log-sum-exp [batch, q_heads, n], float32; zeros and -inf where
        nothing is attended.
    """
    batch, heads, n, dim = q.shape
    grouped = (q.astype(mx.float32) * scale).reshape(batch, k.shape[1], -1, n, dim)
    scores = grouped @ k.astype(mx.float32)[:, :, None].swapaxes(-1, -2)
    scores = mx.where(mask[:, None, None], scores, -mx.inf)
    lse = mx.logsumexp(scores, axis=-1)
    weights = mx.exp(scores - mx.where(lse == -mx.inf, 0.0, lse)[..., None])
    o = weights @ v.astype(mx.float32)[:, :, None]
    return o.reshape(q.shape), lse.reshape(batch, heads, n)
