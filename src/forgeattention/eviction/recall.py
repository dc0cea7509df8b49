"""Which demoted pages come back: an estimate of the attention mass that a page would get."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def mass_estimates(q: NDArray, resident: NDArray, demoted: NDArray, scale: float) -> F64:
    """Largest share of the packed tokens' attention that any query is estimated to give each demoted page.

    A page is taken for 64 tokens at the mean of its keys, the only thing known of a demoted page.

    Args:
        q: [q_heads, n, head_dim].
        resident: means of the keys of the pages at hand, [pages, kv_heads, head_dim].
        demoted: the same of the demoted pages.
        scale: softmax scale.

    Returns:
        [demoted pages], in [0, 1].
    """
    means = np.concatenate([resident, demoted]).astype(np.float32)
    heads = means.shape[1]
    grouped = np.asarray(q, np.float32).reshape(heads, -1, q.shape[2]) * np.float32(scale)
    scores = grouped @ means.transpose(1, 2, 0)
    weights = np.exp(scores - scores.max(2, keepdims=True))
    share = weights[:, :, len(resident) :] / weights.sum(2, keepdims=True)
    return share.max((0, 1)).astype(np.float64)
