"""TriAttention's score evaluated as the paper writes it."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]


def triattention_score(
    q: ArrayLike, k: ArrayLike, key_position: float, position: float, frequencies: ArrayLike, offsets: ArrayLike
) -> float:
    """Score of one key for one head (arXiv 2604.04921).

    Args:
        q: queries before RoPE, complex [n, n_rot / 2]: channel pairs as complex numbers.
        k: the key before RoPE, complex [n_rot / 2].
        key_position: where the key stands.
        position: where the sequence has come to.
        frequencies: radians per position, [n_rot / 2].
        offsets: future distances, averaged over.

    Returns:
        S_trig + S_norm, the latter with weights (1 - R_f) E |q_f|, R_f = |E q_f| / E |q_f|.
    """
    qs, key, w = np.asarray(q), np.asarray(k), np.asarray(frequencies, np.float64)
    centre, length = qs.mean(0), np.abs(qs).mean(0)
    total = 0.0
    for offset in np.asarray(offsets, np.float64):
        for f in range(len(w)):
            phase = np.angle(centre[f]) - np.angle(key[f])
            angle = w[f] * (position + offset - key_position) + phase
            total += np.abs(centre[f]) * np.abs(key[f]) * np.cos(angle)
    total /= len(np.asarray(offsets))
    concentration = np.abs(centre) / length
    return float(total + ((1 - concentration) * length * np.abs(key)).sum())
