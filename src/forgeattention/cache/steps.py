"""One-token steps whose launches never change, so that a CUDA graph of them can be replayed."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..codec import PAGE
from ..ops.table import ExactTokens, PageTable
from .layer import LayerCache
from .rows import I64


class StaticSteps:
    """Steps of a `LayerCache` that read and write its lengths on the device alone, pages included.

    Each step is `prepare` on the host, then `step` (which a graph may hold), then `advance` on the host. What the
    cache holds afterwards is what `LayerCache.step` would have left.

    A page is coded some steps before its tokens leave the exact ones, so that layers can take turns: no step then
    codes the pages of all layers. Until it leaves, nothing reads it, so its place in the pool is a reserve of these
    steps.

        exact tokens   sinks | 64 oldest recent | newer ...    at `encode_at` the 64 are coded,
                                                               at `capacity` they leave

    Args:
        cache: its page table is widened to `max_tokens`; no pages are taken for them yet.
        max_tokens: most packed tokens of a row.
        lead: steps by which a page is coded early, from 1 to the codec's window and at most 63.

    Raises:
        ValueError: a framework whose arrays move, a codec without a window, or a cache with strategies that decide on
            the host.
    """

    def __init__(self, cache: LayerCache, max_tokens: int, lead: int = 1) -> None:
        if not cache.arrays.addressable:
            raise ValueError("[static_steps] expected arrays with addresses; got a framework that moves them")
        if any(x is not None for x in (cache.sparse, cache.eviction, cache.sharding)):
            raise ValueError("[static_steps] expected a cache without sparse, eviction or sharding; got one of them")
        most = most_lead(cache.codec.spec.window)
        if not 1 <= lead <= most:
            raise ValueError(f"[static_steps] expected a lead from 1 to {most}; got {lead}")
        cache.reserve(max_tokens)
        rows, buffer, sinks = cache.rows, cache.buffer, cache.codec.spec.sinks
        self._cache = cache
        self.encode_at = buffer.capacity - lead
        self.max_tokens = rows.page_table.shape[1] * PAGE
        self._table = PageTable(cache.pool.base, rows.page_table, rows.device_packed, self.max_tokens)
        self._exact = ExactTokens(buffer.k, buffer.v, rows.device_exact, buffer.capacity)
        oldest = slice(sinks, sinks + PAGE)
        self._oldest = buffer.k[:, :, oldest], buffer.v[:, :, oldest]
        self._encode_offsets = cache.arrays.zeros((cache.batch,), "int64")
        self._tickets = cache.arrays.zeros((cache.batch,), "int32")
        self._next: I64 = np.full(cache.batch, -1, np.int64)
        self._known: tuple[I64, I64] | None = None

    @property
    def current(self) -> bool:
        """Whether the cache still has the buffers that these steps use; rows that came or went replace them."""
        rows, buffer, table, exact = self._cache.rows, self._cache.buffer, self._table, self._exact
        pairs = ((rows.page_table, table.page_table), (rows.device_packed, table.lengths), (buffer.k, exact.k))
        return all(a is b for a, b in pairs)

    def prepare(self) -> None:
        """Finds a place for every page that the next step codes. Where the cache was changed by other means since the
        last step, the pages that should have been coded by now are.

        Raises:
            ValueError: a row with more than `max_tokens` packed tokens; a full pool. Nothing has changed.
        """
        rows, capacity = self._cache.rows, self._exact.k.shape[2]
        rows.sync()
        if self._known is None or rows.seen is not self._known[0] or rows.packed is not self._known[1]:
            self.close()
            self._known = rows.seen, rows.packed
            self._reserve(rows.exact >= self.encode_at, code=True)
        elif rows.uniform and rows.most_exact + 1 not in (self.encode_at, capacity):
            return
        leaves = rows.exact == capacity - 1
        late = leaves & (self._next < 0)
        if late.any():
            most = int(rows.packed[leaves].max()) + PAGE
            if most > self.max_tokens:
                raise ValueError(f"[static_steps] expected at most {self.max_tokens} packed tokens of a row; got more")
            self._reserve(late, code=True, needed=True)
        self._reserve(rows.exact + 1 == self.encode_at)

    def _reserve(self, which: NDArray[np.bool_], *, code: bool = False, needed: bool = False) -> None:
        """Takes a page for the next of some rows, where the table and the pool have room, and codes it with `code`.
        With `needed` a full pool is an error."""
        cache, rows, sinks = self._cache, self._cache.rows, self._cache.codec.spec.sinks
        at = np.flatnonzero(which & (self._next < 0) & (rows.packed < self.max_tokens))
        if not len(at):
            return
        pool = cache.pool
        if not needed and pool.max_pages is not None and pool.in_use + len(at) > pool.max_pages:
            for row in at.tolist():  # so that nothing is coded to where the table says by accident
                self._cache.arrays.assign(rows.page_table, np.array([-1]), (row, slice(*self._place(row))))
            return
        ids = pool.alloc(len(at))
        self._next[at] = ids
        for row, page in zip(at.tolist(), ids.tolist()):
            oldest = max(int(rows.seen[row]) - max(int(rows.exact[row]) - sinks, 0), sinks)
            rows.place(row, self._place(row)[0], np.array([page]), np.array([oldest]))
        if code:
            offsets = np.full(cache.batch, -1, np.int64)
            offsets[at] = pool.addresses(ids)
            ops.encode_rows(*self._oldest, cache.codec, None, cache.arrays.index(offsets), backend=cache.backend)

    def _place(self, row: int) -> tuple[int, int]:
        first = int(self._cache.rows.packed[row]) // PAGE
        return first, first + 1

    def is_step(self, n: int, keep: Any = None) -> bool:
        """One token of every row is all that comes here."""
        return True

    def fork(self) -> LayerCache:
        """Never asked for: a step attends to what is held after it."""
        raise ValueError("[static_steps] expected a step of one token; got a chunk")

    def step(self, q: Any, k: Any, v: Any, scale: float, *, keep: Any = None, sink_logits: Any | None = None) -> Any:
        """Appends a token k, v [batch, kv_heads, 1, head_dim] to every row and attends, as `LayerCache.step`."""
        exact, table, cache = self._exact, self._table, self._cache
        ops.append_step(
            exact.k, exact.v, exact.lengths, table.lengths, table.page_table, self._encode_offsets, self._tickets, k, v,
            sinks=cache.codec.spec.sinks, encode_at=self.encode_at, backend=cache.backend,
        )  # fmt: skip
        ops.encode_rows(*self._oldest, cache.codec, None, self._encode_offsets, backend=cache.backend)
        return self.attend(q, scale, sink_logits=sink_logits)[0]

    def attend(self, q: Any, scale: float, *, causal: bool = False, sink_logits: Any = None) -> tuple[Any, Any]:
        """Attention of q [batch, q_heads, 1, head_dim] over all that the device's lengths say."""
        cache = self._cache
        options: dict[str, Any] = {"causal": False, "sink_logits": sink_logits, "backend": cache.backend}
        return ops.decode_attention(q, cache.codec, self._table, self._exact, scale, **options)

    def advance(self) -> None:
        """Takes note of a token that the device has appended, and of the pages that left for it."""
        rows = self._cache.rows
        if rows.uniform and rows.most_exact + 1 < self._exact.k.shape[2]:
            rows.count(1)
        else:
            leaves = rows.exact == self._exact.k.shape[2] - 1
            left = np.where(leaves, -1, self._next)  # those pages are the rows' own now
            rows.note(rows.exact + 1 - PAGE * leaves, rows.packed + PAGE * leaves, rows.seen + 1)
            self._next = left
        self._known = rows.seen, rows.packed

    def rewind(self) -> None:
        """Makes the device forget what was appended and not noted. Tokens that moved stay where they are: no row may
        have been full."""
        rows = self._cache.rows
        rows.set_lengths(rows.exact, rows.packed, rows.seen)
        self._known = rows.seen, rows.packed

    def close(self) -> None:
        """Gives back the pages that no row has come to."""
        self._cache.pool.free(self._next[self._next >= 0])
        self._next = np.full(len(self._next), -1, np.int64)
        self._known = None

    def __del__(self) -> None:
        if "_known" in self.__dict__ and not sys.is_finalizing():
            self.close()


def most_lead(window: int) -> int:
    """By how many steps pages can be coded early, for a codec's window; 0 if not at all."""
    return min(window, PAGE - 1)
