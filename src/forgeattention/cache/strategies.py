"""What a layer's cache can be told to do differently: the hooks that `LayerCache` calls.

A cache without strategies keeps every page and attends to all of them. Which strategies go together is decided when a
cache is made: sparse reading and eviction do; sharding over processes goes with neither.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..codec import Codec
from ..ops.table import ExactTokens, PageTable

if TYPE_CHECKING:
    from .layer import LayerCache

I64 = NDArray[np.int64]


class SparseReading(Protocol):
    """Which packed tokens a decode step reads (`sparse.SparseLayer`)."""

    @property
    def min_context(self) -> int:
        """Packed tokens of a row below which it is read whole."""

    def attend(
        self,
        q: Any,
        codec: Codec,
        table: PageTable,
        exact: ExactTokens,
        scale: float,
        causal: bool,
        sink_logits: Any | None,
        backend: str,
    ) -> tuple[Any, Any, Any]:
        """`ops.decode_attention` over the tokens that matter, and a record of what was done."""


class PageEviction(Protocol):
    """Which pages a cache gives up and takes back (`eviction.Evictor`). It belongs to one cache and keeps what it
    knows of each of its rows."""

    def attach(self, cache: LayerCache) -> None:
        """Told once of the cache, which has no tokens yet."""

    def prepare(self, cache: LayerCache, q: Any, scale: float, n: int, keep: NDArray[np.bool_] | None) -> None:
        """Before n tokens are appended, told of the queries q [batch, q_heads, m, head_dim] of the last m of them."""

    def rounds(self, cache: LayerCache) -> AbstractContextManager[None]:
        """Around an append: what is due is planned before it, which may fail, and carried out behind it."""

    def trimmed(self, cache: LayerCache) -> None:
        """After rows were shortened."""

    def take(self, rows: I64) -> PageEviction:
        """One for a cache whose row i is row `rows[i]` of this one's."""

    def empty(self, rows: int) -> PageEviction:
        """One like this for a cache of so many empty rows."""

    def joined(self, other: PageEviction | None) -> PageEviction:
        """One for the rows of this one's cache and behind them those of another.

        Raises:
            ValueError: an eviction of another kind, or none.
        """

    def release(self) -> None:
        """Gives up what is held for the rows; called when they are gone."""

    def report(self, cache: LayerCache) -> dict[str, Any]:
        """What was evicted, as numbers by name."""


class PageSharding(Protocol):
    """Which pages this process keeps of one very long row, and how processes join what they attend to
    (`cache.sharded.Sharding`)."""

    def check_rows(self, rows: I64 | None, batch: int) -> None:
        """Raises ValueError for a batch, or for a choice of rows, that cannot be sharded."""

    def keeps(self, first: int, count: int) -> NDArray[np.bool_]:
        """Which of a row's pages first .. first + count stay here, bool [count]."""

    def check_trim(self, drop: int, recent: int, pages: int) -> None:
        """Raises ValueError where a trim of `drop` tokens, of which `recent` are exact, would reach into pages."""

    def attend(self, cache: LayerCache, q: Any, scale: float, causal: bool, sink_logits: Any) -> tuple[Any, Any]:
        """Attention over the whole row, joined over the processes."""

    def attend_packed(self, cache: LayerCache, q: Any, table: PageTable | None, scale: float) -> Any:
        """Attention over the row's packed tokens, joined over the processes; None where no process has any."""


def check_strategies(*, sparse: Any, eviction: Any, sharding: Any) -> None:
    """Raises ValueError for strategies that do not go together."""
    others = [name for name, x in (("eviction", eviction), ("sparse", sparse)) if x is not None]
    if sharding is not None and others:
        raise ValueError(f"[cache] expected sharding alone; got it with {' and '.join(others)}")
