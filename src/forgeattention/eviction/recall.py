"""Which demoted pages come back: an estimate of the attention mass that a page would get."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def mass_estimates(q: NDArray, means: NDArray, scale: float) -> F64:
    """Largest share of the packed tokens' attention that any query is estimated to give each page.

    A page is taken for 64 tokens at the mean of its keys, the only thing known of a demoted page.

    Args:
        q: [q_heads, n, head_dim].
        means: of the keys of all pages, those at hand and the demoted ones, [pages, kv_heads, head_dim].
        scale: softmax scale.

    Returns:
        [pages], in [0, 1].
    """
    heads = means.shape[1]
    grouped = np.asarray(q, np.float32).reshape(heads, -1, q.shape[2]) * np.float32(scale)
    scores = grouped @ means.astype(np.float32).transpose(1, 2, 0)
    weights = np.exp(scores - scores.max(2, keepdims=True))
    return (weights / weights.sum(2, keepdims=True)).max((0, 1)).astype(np.float64)


def visitors(share: F64, guests: F64, least: float, room: int, most: int) -> tuple[list[int], list[int]]:
    """Which demoted pages come, and which recalled ones go for them.

    Args:
        share: estimates of the demoted pages.
        guests: estimates of the recalled pages that are there.
        least: a page comes for at least this share.
        room: how many more may be there.
        most: how many may come at all.

    Returns:
        Indices of demoted pages, and of guests. A guest goes for a page of twice its share only, or pages would come
        and go at every step.
    """
    order = [i for i in np.argsort(-share, kind="stable").tolist() if share[i] >= least][:most]
    come, rest = order[:room], order[room:]
    go: list[int] = []
    for i, guest in zip(rest, np.argsort(guests, kind="stable").tolist()):
        if share[i] < 2 * guests[guest]:
            break
        come.append(i)
        go.append(guest)
    return come, go
