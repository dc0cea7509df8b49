"""Sparse attention: which packed tokens a query keeps, and attention over those alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..codec.codec import Codec
from ..codec.packing import split_record, unpack_header
from ..codec.spec import PAGE
from .pages import matrices

F64 = NDArray[np.float64]


def page_statistics(scores: ArrayLike) -> F64:
    """Of each page of 64 tokens the largest score m and the sum of exp(score - m).

    Args:
        scores: [..., tokens], -inf where there is no token.

    Returns:
        [..., pages, 2]; -inf and 0 for a page without tokens.
    """
    s = np.asarray(scores, np.float64)
    pages = -(-s.shape[-1] // PAGE)
    pad = [(0, 0)] * (s.ndim - 1) + [(0, pages * PAGE - s.shape[-1])]
    s = np.pad(s, pad, constant_values=-np.inf).reshape(*s.shape[:-1], pages, PAGE)
    top = s.max(-1, initial=-np.inf)
    return np.stack([top, np.exp(s - np.where(np.isfinite(top), top, 0)[..., None]).sum(-1)], -1)


def page_scores(q: ArrayLike, pages: NDArray[np.uint8], codec: Codec, scale: float) -> F64:
    """Scaled scores of queries against the mean key of each page.

    Args:
        q: [q_heads, n, head_dim].
        pages: [pages, kv_heads, record_bytes].
        codec: the layer's codec.
        scale: softmax scale.

    Returns:
        [q_heads, n, pages].
    """
    means = np.zeros((codec.kv_heads, len(pages), codec.head_dim))
    for p, h in np.ndindex(pages.shape[:2]):
        row = split_record(pages[p, h], codec.format)["mean"]
        _, inverse, mu = matrices(codec.k_transform, h)
        means[h, p] = (inverse @ (row.astype(np.float64) * unpack_header(row)[0]) + mu)[: codec.head_dim]
    q64 = np.asarray(q, np.float64)
    return scale * np.einsum("hnd,hpd->hnp", q64, np.repeat(means, q64.shape[0] // codec.kv_heads, 0))


def survivors(scores: ArrayLike, threshold: ArrayLike, last: ArrayLike) -> NDArray[np.bool_]:
    """Which tokens are kept: those above the threshold, and of those equal to it the ones up to position `last`.

    Args:
        scores: [..., tokens], -inf where there is no token.
        threshold, last: [...].

    Returns:
        bool [..., tokens].
    """
    s, t = np.asarray(scores, np.float64), np.asarray(threshold, np.float64)[..., None]
    equal = (s == t) & (np.arange(s.shape[-1]) <= np.asarray(last)[..., None])
    return ((s > t) | equal) & (s > -np.inf)


def sparse_threshold(
    scores: ArrayLike, top_k: int | None, top_p: float | None, exact_lse: float = -np.inf
) -> tuple[float, int, int, float]:
    """The threshold of one query.

    Args:
        scores: [tokens], finite.
        top_k: keep so many of the largest scores, the earlier of equal ones first.
        top_p: or keep the fewest tokens, largest scores first, that with the exact tokens carry this share of the mass.
        exact_lse: log-sum-exp of the tokens that are attended anyway.

    Returns:
        threshold and last position (see `survivors`; inf and -1 for none), tokens kept, and the share of the whole
        softmax mass that is dropped.
    """
    s = np.asarray(scores, np.float64)
    order = np.argsort(-s, kind="stable")
    top = max(float(s.max(initial=-np.inf)), exact_lse)
    mass = np.exp(s[order] - top) if np.isfinite(top) else np.zeros(len(s))
    total = mass.sum() + (np.exp(exact_lse - top) if np.isfinite(top) else 0)
    dropped = np.concatenate([np.cumsum(mass[::-1])[::-1], [0.0]]) / (total if total > 0 else 1)
    if top_k is not None:
        kept = min(top_k, len(s))
    elif top_p is not None:
        kept = int(np.flatnonzero(dropped <= 1 - top_p)[0])
    else:
        raise ValueError("[sparse_threshold] expected top_k or top_p; got neither")
    if kept == 0:
        return np.inf, -1, 0, float(dropped[0])
    return float(s[order[kept - 1]]), int(order[kept - 1]), kept, float(dropped[kept])


def sparse_attention(scores: ArrayLike, keep: ArrayLike, v: ArrayLike) -> tuple[F64, F64]:
    """Softmax attention over the kept tokens.

    Args:
        scores: [q_heads, n, tokens].
        keep: bool, likewise.
        v: [kv_heads, tokens, head_dim].

    Returns:
        o [q_heads, n, head_dim] and the log-sum-exp [q_heads, n]; zeros and -inf where nothing is kept.
    """
    s = np.where(np.asarray(keep, bool), np.asarray(scores, np.float64), -np.inf)
    v64 = np.asarray(v, np.float64)
    top = s.max(-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0)
    p = np.exp(s - top)
    total = p.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + top[..., 0]
    weights = p / np.where(total > 0, total, 1)[..., None]
    return np.einsum("hnt,htd->hnd", weights, np.repeat(v64, s.shape[0] // v64.shape[0], 0)), lse


def page_select(
    means: ArrayLike, exact_lse: ArrayLike, used: int, most: int, top_p: float | None
) -> tuple[NDArray[np.int64], int]:
    """The pages that one KV head reads: those to which any of its queries is estimated to give the largest share.

    Args:
        means: [group, n, pages], scores of the pages' mean keys; -inf past the last page.
        exact_lse: [group, n], log-sum-exp of the tokens that are attended anyway.
        used: pages that the row has.
        most: pages to choose, at most.
        top_p: choose so many that with the exact tokens every query keeps this share of its estimated mass.

    Returns:
        All pages, the largest share first, the earlier of equal ones first; and how many of them are chosen.
    """
    mass = PAGE * np.exp(np.asarray(means, np.float64))
    whole = mass.sum(-1) + np.exp(np.asarray(exact_lse, np.float64))
    share = (mass / np.where(whole > 0, whole, 1.0)[..., None]).reshape(whole.size, mass.shape[-1])
    order = np.argsort(-share.max(0, initial=0.0), kind="stable")
    count = min(used, most)
    if top_p is not None:
        for count in range(used + 1):
            if (share[:, order[count:]].sum(-1) <= 1 - top_p).all():
                break
    return order, count
