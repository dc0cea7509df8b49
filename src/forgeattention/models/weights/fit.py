"""A codec's diagonal and Gram matrix from the energies of a layer's query and key projections."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...codec.codec import Codec
from ...codec.spec import CodecSpec

log = logging.getLogger("forgeattention")
F64 = NDArray[np.float64]
FLOOR = 1e-4
"""Least energy of a channel over the mean, so that an empty one gets a finite scale."""
STEPS = 16
"""Scales of channels are rounded to so many steps per octave: rounding on another device must not change a codec."""


@dataclass(frozen=True, eq=False)
class KeyWeights:
    """What one layer's weights say about its keys.

    Attributes:
        diagonal: scales of the key channels, [kv_heads, head_dim].
        query_energy: c_q, [kv_heads, head_dim], summed over the query heads of a KV head.
    """

    diagonal: F64
    query_energy: F64

    def codec(self, spec: CodecSpec) -> Codec:
        """A codec for the layer; `spec` with rotation "hadamard"."""
        heads, dim = self.diagonal.shape
        gram = self.query_energy[:, :, None] * np.eye(dim)
        return Codec(spec, dim, heads, k_diagonal=self.diagonal, query_gram=gram)


def warn_of_unknown(found: dict[int, KeyWeights | str]) -> None:
    """Logs why keys of some layers are not fitted to the model."""
    for text in sorted({r for r in found.values() if isinstance(r, str)}):
        log.warning("keys are coded without the model's weights in some layers: %s", text)
    if not found:
        log.warning("keys are coded without the model's weights: no layer with a self_attn was found")


class UnknownForm(Exception):
    """A layer whose weights are not where they are looked for; says so."""


def fit(c_q: F64, c_k: F64, pairs: NDArray[np.intp], q_gain: F64 | None, k_gain: F64 | None) -> KeyWeights:
    """What a layer's keys and queries are like.

    Args:
        c_q, c_k: energy of each channel as projected, [q_heads, head_dim] and [kv_heads, head_dim].
        pairs: [2, head_dim], every channel and the one that RoPE turns it into (itself if none).
        q_gain, k_gain: [head_dim], gains of norms over the channels of a head after the projections, or None.

    Raises:
        UnknownForm: an energy that no model has.
    """
    for c, gain in ((c_q, q_gain), (c_k, k_gain)):
        if gain is not None:
            # A norm over the channels of a head sets their sum; its gain is linear.
            c *= c.shape[1] / c.sum(1, keepdims=True) * gain**2
    kv_heads = len(c_k)
    c_q = c_q.reshape(kv_heads, -1, c_k.shape[1]).sum(1)
    c_q, c_k = c_q[:, pairs].mean(1), c_k[:, pairs].mean(1)
    if not (np.isfinite(c_q).all() and np.isfinite(c_k).all() and (c_q.sum(1) > 0).all() and (c_k.sum(1) > 0).all()):
        raise UnknownForm("a projection is zero or not finite")
    ratio = (c_q / c_q.mean(1, keepdims=True) + FLOOR) / (c_k / c_k.mean(1, keepdims=True) + FLOOR)
    return KeyWeights(2.0 ** (np.rint(STEPS * np.log2(ratio) / 4) / STEPS), c_q)
