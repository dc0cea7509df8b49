"""Recurrent layers' states in a prompt cache, and going back to earlier ones.

A recurrent state cannot forget its newest tokens: it can only be put back to what it was. mlx-lm's trim_prompt_cache
then does nothing and returns 0, which its speculative decoding does not look at for the draft model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock


class SnapshotCache(stock.ArraysCache):
    """A recurrent layer's cache that remembers states: that of the newest steps of several tokens, such as the end of
    a prompt, and those of the newest single steps, `snapshots` of each.

    A snapshot is the state's own arrays, which MLX never changes. Models must call `advance`, as mlx-lm's do that
    batch; else no state is remembered.
    """

    def __init__(self, size: int, left_padding: list[int] | None = None, *, snapshots: int = 0) -> None:
        super().__init__(size, left_padding)
        self.snapshots = snapshots
        self.position = 0
        self._past: list[tuple[int, bool, list[mx.array]]] = []

    def advance(self, N: int) -> None:
        super().advance(N)
        self.position += N
        if self.lengths is not None or self.left_padding is not None:
            return
        self._past.append((self.position, N > 1, list(self.cache)))
        for several in (False, True):
            kept = [entry for entry in self._past if entry[1] == several]
            for entry in kept[: max(0, len(kept) - self.snapshots)]:
                self._past.remove(entry)

    def can_go_back(self, n: int) -> bool:
        """Whether the state of n tokens ago is known."""
        return n == 0 or any(position == self.position - n for position, *_ in self._past)

    def trim(self, n: int) -> int:
        """Puts the state of n tokens ago back.

        Raises:
            ValueError: it is not known.
        """
        if not self.can_go_back(n):
            known = sorted(self.position - position for position, *_ in self._past)
            raise ValueError(f"[mlx_lm] expected to trim one of {known} tokens of a recurrent layer; got {n}")
        self.position -= n
        self._past = [entry for entry in self._past if entry[0] <= self.position]
        if n:
            self.cache = list(self._past[-1][2])
        return n

    def filter(self, batch_indices: Any) -> None:
        super().filter(batch_indices)
        self._past = []

    def extend(self, other: Any) -> None:
        super().extend(other)
        self._past = []

    @property
    def nbytes(self) -> int:
        arrays = {
            id(x): x.nbytes for state in (self.cache, *(e[2] for e in self._past)) for x in state if x is not None
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
        raise ValueError(
            f"[mlx_lm] expected layers that can go back {n} tokens; got {stuck[0][1]} in layer {stuck[0][0]}: keep a "
            "copy.deepcopy of the cache, or snapshots of its recurrent layers"
        )
    return max((part.trim(n) for _, part in parts), default=0)


def _can_go_back(part: Any, n: int) -> bool:
    return part.can_go_back(n) if isinstance(part, SnapshotCache) else part.is_trimmable()
