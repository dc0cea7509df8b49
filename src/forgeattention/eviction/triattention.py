"""TriAttention: how much attention a key will get, told from where queries lie before RoPE (arXiv 2604.04921).

Before RoPE the queries of a head gather around a fixed centre. So the score that a key at position p will get from a
query at position P + d is, per pair of channels f, |E q_f| |k_f| cos(w_f (P + d - p) + arg E q_f - arg k_f): a
trigonometric series in the distance. It is averaged over the offsets d = 1, 2, 4, ..., 65536. In terms of the key as it
is cached (after RoPE) the whole average is one dot product with a folded query, made once per round. What the centre
does not say of a scattered head is added as a norm term, sum_f (E |q_f| - |E q_f|) |k_f|.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..models.rope import C128, F64, Rope
from ..util.tensor_files import load_tensors, save_tensors

KIND = {"format": "forgeattention centres", "version": "1"}
OFFSETS = 2 ** np.arange(17)
"""Future distances over which scores are averaged."""


class Centres:
    """Means of one layer's queries before RoPE, gathered as they come.

    Args:
        rope: the layer's rotation.
        heads: query heads.

    Attributes:
        count: queries seen.
    """

    def __init__(self, rope: Rope, heads: int) -> None:
        self.rope = rope
        self.count = 0
        half = len(rope.frequencies)
        self._mean: C128 = np.zeros((heads, half), np.complex128)
        self._abs: F64 = np.zeros((heads, half))

    def add(self, q: ArrayLike, positions: ArrayLike) -> None:
        """Takes queries after RoPE, [heads, n, head_dim], at positions [n]."""
        z = self.rope.pairs(q) * self.rope.turn(positions).conj()
        n = z.shape[1]
        if n == 0:
            return
        self.count += n
        share = n / self.count
        self._mean = self._mean + share * (z.mean(1) - self._mean)
        self._abs = self._abs + share * (np.abs(z).mean(1) - self._abs)

    def folded(self, position: int, head_dim: int) -> F64:
        """Queries [heads, head_dim] whose dot product with a cached key is its mean trigonometric score, for a sequence
        that has come to `position`."""
        cos_sin_sum = self.rope.turn(position + OFFSETS).mean(0)
        return self.rope.channels(self._mean * cos_sin_sum, head_dim)

    def norm_weights(self) -> F64:
        """E |q_f| - |E q_f| of every head, [heads, n_rot / 2]."""
        return self._abs - np.abs(self._mean)

    def copy(self) -> Centres:
        out = Centres(self.rope, len(self._mean))
        out.count, out._mean, out._abs = self.count, self._mean, self._abs
        return out

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """What `from_arrays` restores: count [1], real, imag and abs [heads, n_rot / 2]."""
        return {"count": np.array([float(self.count)]), "real": self._mean.real, "imag": self._mean.imag,
                "abs": self._abs}  # fmt: skip

    @classmethod
    def from_arrays(cls, rope: Rope, arrays: Mapping[str, NDArray[np.float64]]) -> Centres:
        """The inverse of `arrays`. Raises ValueError where they are none, or of another rotation."""
        if set(arrays) != {"count", "real", "imag", "abs"} or arrays["abs"].ndim != 2 or arrays["count"].shape != (1,):
            raise ValueError(f"[centres] expected count, real, imag and abs of each head; got {sorted(arrays)}")
        shape = len(arrays["abs"]), len(rope.frequencies)
        if arrays["abs"].shape != shape:
            raise ValueError(f"[centres] expected {shape[1]} frequencies per head; got {arrays['abs'].shape[1]}")
        if any(arrays[name].shape != shape or not np.isfinite(arrays[name]).all() for name in ("real", "imag", "abs")):
            raise ValueError(f"[centres] expected finite means {list(shape)}; got others")
        out = cls(rope, shape[0])
        out.count = int(arrays["count"][0])
        out._mean = arrays["real"] + 1j * arrays["imag"]
        out._abs = arrays["abs"].copy()
        return out


def save_centres(path: str | os.PathLike[str], layers: Mapping[int, Centres]) -> None:
    """Writes the centres of a model's layers to a safetensors file, whole or not at all."""
    tensors = {f"{i}.{name}": x.copy() for i, c in layers.items() for name, x in c.arrays().items()}
    save_tensors(path, tensors, KIND)


def load_centres(path: str | os.PathLike[str], rope: Rope) -> dict[int, Centres]:
    """Reads what `save_centres` wrote. Raises ValueError for a damaged file or another rotation."""
    _, tensors = load_tensors(path, "centres", KIND)
    layers: dict[int, dict[str, NDArray[np.float64]]] = {}
    for name, array in tensors.items():
        number, _, part = name.partition(".")
        if not number.isdecimal():
            raise ValueError(f"[centres] expected arrays named by their layers; got {name!r}")
        layers.setdefault(int(number), {})[part] = array
    return {i: Centres.from_arrays(rope, parts) for i, parts in layers.items()}


def join_heads(scores: F64) -> F64:
    """One score per token from those of all heads, [heads, ...] to [...]: each head's scores are brought to mean 0 and
    deviation 1, and a token counts as much as the head that wants it most."""
    flat = scores.reshape(len(scores), -1)
    centred = flat - flat.mean(1, keepdims=True)
    deviation = flat.std(1, keepdims=True)
    return (centred / np.where(deviation > 0, deviation, 1)).max(0).reshape(scores.shape[1:])
