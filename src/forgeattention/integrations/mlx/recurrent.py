"""Recurrent layers' states in a prompt cache, and going back to earlier ones.

A recurrent state cannot forget its newest tokens: it can only be put back to what it was. mlx-lm's trim_prompt_cache
then does nothing and returns 0, which its speculative decoding does not look at for the draft model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as stock

from .stored import read_fields

FIELDS: dict[str, type] = {"snapshots": int, "position": int, "last": str, "past": list}
"""Of a state's header."""


class Snapshot(NamedTuple):
    """A state.

    Attributes:
        position: tokens behind it.
        kind: "several" tokens came last, the "first" single one after them, or another "single" one.
        arrays: the state's own.
    """

    position: int
    kind: str
    arrays: list[Any]


class SnapshotCache(stock.ArraysCache):
    """A recurrent layer's cache that remembers states: after the newest steps of several tokens, such as all but the
    last token of a prompt, after the single token that follows such a step, and after the newest single tokens;
    `snapshots` of each. A reply can so be taken back whole: mlx-lm reads the last token of a prompt by itself.

    A snapshot is the state's own arrays, which MLX never changes. Models must call `advance`, as mlx-lm's do that
    batch; else no state is remembered.
    """

    def __init__(self, size: int, left_padding: list[int] | None = None, *, snapshots: int = 0) -> None:
        super().__init__(size, left_padding)
        self.snapshots = snapshots
        self.position = 0
        self._past: list[Snapshot] = []
        self._last = "single"

    def advance(self, N: int) -> None:
        super().advance(N)
        self.position += N
        if self.lengths is not None or self.left_padding is not None:
            return
        self._last = "several" if N > 1 else "first" if self._last == "several" else "single"
        self._past.append(Snapshot(self.position, self._last, list(self.cache)))
        kept = [entry for entry in self._past if entry.kind == self._last]
        if len(kept) > self.snapshots:
            self._past.remove(kept[0])

    def can_go_back(self, n: int) -> bool:
        """Whether the state of n tokens ago is known."""
        return n == 0 or n in self.ways_back()

    def ways_back(self) -> list[int]:
        """For which n the state of n tokens ago is known, beside 0."""
        return sorted({self.position - entry.position for entry in self._past} - {0})

    def trim(self, n: int) -> int:
        """Puts the state of n tokens ago back.

        Raises:
            ValueError: it is not known.
        """
        if not self.can_go_back(n):
            raise ValueError(
                f"[mlx_lm] expected to trim one of {self.ways_back()} tokens of a recurrent layer; got {n}"
            )
        if n:
            self.position -= n
            self._past = [entry for entry in self._past if entry.position <= self.position]
            self._last, self.cache = self._past[-1].kind, list(self._past[-1].arrays)
        return n

    @property
    def state(self) -> Any:
        """The contents as arrays, for `mx.eval` and mlx-lm's save_prompt_cache: what is kept, as JSON in bytes; the
        state, as `ArraysCache` gives it; the remembered states."""
        past = [[entry.position, entry.kind] for entry in self._past]
        header = {"snapshots": self.snapshots, "position": self.position, "last": self._last, "past": past}
        told = mx.array(np.frombuffer(json.dumps(header).encode(), np.uint8))
        return told, super().state, *(entry.arrays for entry in self._past)

    @state.setter
    def state(self, value: Any) -> None:
        told, now, *arrays = value
        header = read_fields(told, FIELDS)
        past = [(int(position), str(kind)) for position, kind in header["past"]]
        if len(past) != len(arrays):
            raise ValueError(f"[mlx_lm] expected {len(past)} remembered states; got {len(arrays)}")
        self.cache, self.left_padding, self.lengths = now
        self.snapshots, self.position, self._last = int(header["snapshots"]), int(header["position"]), header["last"]
        self._past = [Snapshot(position, kind, list(x)) for (position, kind), x in zip(past, arrays)]

    def filter(self, batch_indices: Any) -> None:
        super().filter(batch_indices)
        self._past = []

    def extend(self, other: Any) -> None:
        super().extend(other)
        self._past = []

    @property
    def nbytes(self) -> int:
        arrays = {
            id(x): x.nbytes for state in (self.cache, *(e.arrays for e in self._past)) for x in state if x is not None
        }
        return sum(arrays.values())


def trim_prompt_cache(cache: Sequence[Any], n: int) -> int:
    """Removes the newest n tokens of a prompt cache, from all layers or none.

    Args:
        cache: a prompt cache.
        n: how many; at most so many as each layer holds are removed.

    Returns:
        How many were removed.

    Raises:
        ValueError: a layer cannot go back so far: a rotating cache that is full, or a recurrent state that was not
            remembered (`make_prompt_cache(model, snapshots=...)`). Nothing has changed.
    """
    parts = [(i, part) for i, layer in enumerate(cache) for part in getattr(layer, "caches", [layer])]
    stuck = [(i, type(part).__name__) for i, part in parts if n and not _can_go_back(part, n)]
    if stuck:
        known = [set(part.ways_back()) for _, part in parts if isinstance(part, SnapshotCache)]
        ways = sorted(set.intersection(*known)) if known else []
        raise ValueError(
            f"[mlx_lm] expected layers that can go back {n} tokens; got {stuck[0][1]} in layer {stuck[0][0]}: "
            + (
                f"its snapshots are of {ways} tokens ago"
                if ways
                else "keep a copy.deepcopy of the cache, or snapshots of its recurrent layers"
            )
        )
    return max((part.trim(n) for _, part in parts), default=0)


def _can_go_back(part: Any, n: int) -> bool:
    return part.can_go_back(n) if isinstance(part, SnapshotCache) else part.is_trimmable()
