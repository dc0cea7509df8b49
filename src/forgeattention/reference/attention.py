"""Attention over keys and values, packed or not."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..codec.codec import Codec
from .pages import decode_pages

F64 = NDArray[np.float64]


def attention(q: ArrayLike, k: ArrayLike, v: ArrayLike, scale: float, mask: ArrayLike | None = None) -> tuple[F64, F64]:
    """Softmax attention with grouped queries.

    Args:
        q: [q_heads, n, head_dim]; query head h reads KV head h // (q_heads / kv_heads).
        k, v: [kv_heads, tokens, head_dim].
        scale: softmax scale.
        mask: bool [n, tokens] or [q_heads, n, tokens], True where attended; None for all.

    Returns:
        o [q_heads, n, head_dim] and the log-sum-exp [q_heads, n]; zeros and -inf where nothing is attended.
    """
    q64, k64, v64 = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q64.shape[0] // k64.shape[0]
    s = scale * np.einsum("hnd,htd->hnt", q64, np.repeat(k64, group, 0))
    if mask is not None:
        s = np.where(np.asarray(mask, bool), s, -np.inf)
    top = s.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(np.isfinite(top), top, 0))
    total = p.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + np.where(np.isfinite(top[..., 0]), top[..., 0], 0)
    o = np.einsum("hnt,htd->hnd", p / np.where(total > 0, total, 1)[..., None], np.repeat(v64, group, 0))
    return o, lse


def merge(parts: list[tuple[F64, F64]]) -> tuple[F64, F64]:
    """Joins attention over disjoint sets of tokens: list of (o [..., head_dim], lse [...])."""
    lse = np.stack([l for _, l in parts])
    top = lse.max(0)
    w = np.exp(lse - np.where(np.isfinite(top), top, 0))
    total = w.sum(0)
    o = sum(wi[..., None] * oi for wi, (oi, _) in zip(w, parts)) / np.where(total > 0, total, 1)[..., None]
    with np.errstate(divide="ignore"):
        return o, np.log(total) + np.where(np.isfinite(top), top, 0)


def qk_scores(q: ArrayLike, pages: NDArray[np.uint8], length: int, codec: Codec, scale: float) -> F64:
    """Scaled scores of q [q_heads, n, head_dim] against the first `length` packed tokens: [q_heads, n, length]."""
    k, _ = decode_pages(pages, codec)
    q64 = np.asarray(q, np.float64)
    return scale * np.einsum("hnd,htd->hnt", q64, np.repeat(k[:, :length], q64.shape[0] // k.shape[0], 0))


def value_sum(p: ArrayLike, pages: NDArray[np.uint8], codec: Codec) -> F64:
    """Weighted sums of packed values, p [q_heads, n, length] -> [q_heads, n, head_dim]."""
    _, v = decode_pages(pages, codec)
    p64 = np.asarray(p, np.float64)
    return np.einsum("hnt,htd->hnd", p64, np.repeat(v[:, : p64.shape[2]], p64.shape[0] // v.shape[0], 0))


def decode_attention(
    q: ArrayLike,
    pages: NDArray[np.uint8],
    length: int,
    codec: Codec,
    scale: float,
    exact_k: ArrayLike | None = None,
    exact_v: ArrayLike | None = None,
    causal: bool = True,
) -> tuple[F64, F64]:
    """Attention of the newest n tokens of one sequence over its packed and its exact tokens.

    Args:
        q: [q_heads, n, head_dim], the queries of the last n tokens.
        pages: [pages, kv_heads, record_bytes].
        length: packed tokens.
        codec: the layer's codec.
        scale: softmax scale.
        exact_k, exact_v: [kv_heads, tokens, head_dim], sinks first, then recent tokens, the queries' own last.
        causal: query i of n does not see the last n - 1 - i exact tokens.

    Returns:
        o [q_heads, n, head_dim] and the log-sum-exp [q_heads, n].
    """
    k, v = decode_pages(pages, codec) if length else (np.zeros((codec.kv_heads, 0, codec.head_dim)),) * 2
    k, v = k[:, :length], v[:, :length]
    if exact_k is not None and exact_v is not None:
        k = np.concatenate([k, np.asarray(exact_k, np.float64)], 1)
        v = np.concatenate([v, np.asarray(exact_v, np.float64)], 1)
    n, tokens = np.shape(q)[1], k.shape[1]
    last = np.arange(n)[:, None] - (n - 1) if causal else np.zeros((n, 1), np.int64)
    return attention(q, k, v, scale, np.arange(tokens) < tokens + last)


prefill_attention = decode_attention
