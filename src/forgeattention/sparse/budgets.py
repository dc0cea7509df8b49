"""Tokens that each query head may keep, measured on a model (`forgeattn calibrate --sparse`)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..util.files import read_json, write_json

FORMAT = "forgeattention budgets 1"


@dataclass(frozen=True, eq=False)
class Budgets:
    """Budgets of a model's packed layers.

    Attributes:
        fingerprint: of the model (`models.fingerprint`).
        layers: by layer number, int32 [q_heads].
    """

    fingerprint: str
    layers: Mapping[int, NDArray[np.int32]]

    @property
    def mean(self) -> float:
        """Tokens of a query head."""
        return float(np.mean([b.mean() for b in self.layers.values()]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file, whole or not at all."""
        layers = {str(i): b.tolist() for i, b in self.layers.items()}
        held = {"format": FORMAT, "fingerprint": self.fingerprint, "layers": layers}
        write_json(path, held | {"sha256": _checksum(held)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], fingerprint: str) -> Budgets:
        """Reads a file of `save`.

        Raises:
            ValueError: another format, another model, or numbers that are no budgets.
        """
        data = read_json(path, "budgets", "a file of calibrate --sparse")
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"[budgets] expected format {FORMAT!r}; got {found!r}")
        claimed = data.pop("sha256", None)
        if claimed != _checksum(data):
            raise ValueError(f"[budgets] expected checksum {_checksum(data)}; got {claimed!r}: {path} was changed")
        owner, held = data.get("fingerprint"), data.get("layers")
        if not isinstance(held, dict) or not all(i.isdecimal() and isinstance(b, list) for i, b in held.items()):
            raise ValueError(f"[budgets] expected a list of numbers by layer; got {path} without")
        layers = {int(i): np.array(b) for i, b in held.items()}
        if owner != fingerprint:
            raise ValueError(f"[budgets] expected budgets of model {fingerprint}; got those of {owner}")
        for i, b in layers.items():
            if b.ndim != 1 or b.dtype.kind != "i" or len(b) == 0 or b.min() < 0 or b.max() > 2**31 - 1:
                raise ValueError(f"[budgets] expected whole numbers >= 0 for the heads of layer {i}; got {b.tolist()}")
        return cls(owner, {i: b.astype(np.int32) for i, b in layers.items()})


def _checksum(held: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def water_fill(dropped: NDArray[np.float64], counts: NDArray[np.int64], total: int) -> NDArray[np.int32]:
    """Budgets of all heads under a total, such that the worst head's dropped mass is smallest.

    Every head is given what it needs to drop at most a level, and the level is lowered until the total is spent; what a
    coarse curve leaves over goes to the heads that then drop the most.

    Args:
        dropped: mass that a head drops when it keeps counts[i] tokens, [heads, points], falling along the points.
        counts: rising numbers of tokens [points], the first 0.
        total: tokens of all heads together.

    Returns:
        int32 [heads].

    Raises:
        ValueError: curves that do not fall, or counts that do not rise from 0.
    """
    d = np.asarray(dropped, np.float64)
    if d.ndim != 2 or d.shape[1] != len(counts) or (np.diff(d, axis=1) > 1e-9).any():
        raise ValueError(f"[water_fill] expected falling curves [heads, {len(counts)}]; got {list(d.shape)}")
    if counts[0] != 0 or (np.diff(counts) <= 0).any() or total < 0:
        raise ValueError(f"[water_fill] expected counts that rise from 0 and a total >= 0; got {counts}, {total}")

    def need(level: float) -> NDArray[np.float64]:
        """Tokens that bring each head to the level, between points by straight lines."""
        out = np.zeros(len(d))
        for h, curve in enumerate(d):
            out[h] = counts[-1] if curve[-1] > level else np.interp(-level, -curve, counts)
        return out

    low, high = 0.0, float(d[:, 0].max(initial=0.0))
    for _ in range(60):
        level = (low + high) / 2
        if np.ceil(need(level)).sum() <= total:
            high = level
        else:
            low = level
    budgets = np.ceil(need(high)).astype(np.int64)
    left = total - int(budgets.sum())
    while left > 0 and (budgets < counts[-1]).any():
        now = np.array([np.interp(b, counts, curve) for b, curve in zip(budgets, d)])
        now[budgets >= counts[-1]] = -1
        worst = np.argsort(-now)[: max(1, min(left, len(d)))]
        worst = worst[budgets[worst] < counts[-1]]
        budgets[worst] += 1
        left -= len(worst)
    return budgets.astype(np.int32)
