"""What eviction remembers: of pages, of rows, of what it did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Note:
    """What is remembered of a page: the mean of its keys [kv_heads, head_dim] and the mean size of their rotated pairs
    [kv_heads, n_rot / 2] (none without a rotation)."""

    mean: F32
    sizes: F32


@dataclass(frozen=True, eq=False)
class Demoted:
    """A page in the store: its first position, its number there, its note."""

    start: int
    number: int
    note: Note


@dataclass
class Counts:
    """What eviction did so far, in pages but for `rounds`.

    Attributes:
        rounds: rounds in which a page was given up.
        evicted: pages given up, those demoted among them.
        demoted: pages put into the store.
        recalled: pages that came back.
        refused: pages that were wanted back while `recall_pages` others were there.
        lost: pages dropped because the store was full.
    """

    rounds: int = 0
    evicted: int = 0
    demoted: int = 0
    recalled: int = 0
    refused: int = 0
    lost: int = 0


@dataclass
class Round:
    """One row's round, planned: which pages go, and what became of their bytes."""

    row: int
    gone: NDArray[np.bool_]
    demoted: list[Demoted]
    lost: int


@dataclass(frozen=True, eq=False)
class RowHistory:
    """What is known of each row; replaced, never changed.

    Attributes:
        last: length at the last round, [rows].
        demoted: pages in the store, by position.
        guests: recalled pages by first position, with the length at which they came.
    """

    last: I64
    demoted: tuple[tuple[Demoted, ...], ...]
    guests: tuple[Mapping[int, int], ...]

    @classmethod
    def empty(cls, rows: int) -> RowHistory:
        return cls(np.zeros(rows, np.int64), ((),) * rows, ({},) * rows)

    def take(self, index: I64) -> RowHistory:
        rows = index.tolist()
        return RowHistory(self.last[index], tuple(self.demoted[i] for i in rows), tuple(self.guests[i] for i in rows))

    def with_row(self, row: int, demoted: Iterable[Demoted], guests: Mapping[int, int]) -> RowHistory:
        d, g = list(self.demoted), list(self.guests)
        d[row], g[row] = tuple(demoted), guests
        return RowHistory(self.last, tuple(d), tuple(g))

    def all_demoted(self) -> list[Demoted]:
        return [d for row in self.demoted for d in row]
