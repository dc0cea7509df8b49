"""Where the tokens of a batch of rows lie: lengths, pages and their positions, on the host and on the device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..codec import PAGE
from ..ops.table import PageTable
from .arrays import Arrays
from .pool import Ids, PagePool

I64 = NDArray[np.int64]


class RowTable:
    """Lengths and pages of the rows of one layer's cache.

    The host's arrays say what is true and the device's follow. A change is prepared first and then takes effect by
    plain assignments, which cannot fail; where a call failed midway, the device's arrays are written again from the
    host's before anything reads them. References to pages are the owner's business (`PagePool.share`, `free`).

    Args:
        arrays: framework and device.
        pool: where the pages are.
        exact, packed, seen, ids, starts: the contents, as the attributes.

    Attributes:
        exact: exact tokens of each row, sinks and recent ones, int64 [batch]. These five are replaced, never written
            to where a reader looks.
        packed: packed tokens of each row, int64 [batch], whole pages.
        seen: all tokens that each row has come to, evicted ones included, int64 [batch].
        ids: pages of the pool, int64 [batch, max_pages]; entries past a row's last page mean nothing.
        starts: position of each page's first token, ascending, like `ids`.
        device_exact, device_packed: the lengths on the device, int32 [batch].
        page_table: byte offset of each page on the device, int64 [batch, max_pages].
        most_exact, most_packed: the largest lengths.
        uniform: whether all rows hold the same numbers of packed and exact tokens.
    """

    exact: I64
    packed: I64
    seen: I64
    most_exact: int
    most_packed: int
    uniform: bool

    def __init__(
        self, arrays: Arrays, pool: PagePool, exact: I64, packed: I64, seen: I64, ids: Ids, starts: I64
    ) -> None:
        batch = len(exact)
        self.arrays = arrays
        self.pool = pool
        self.ids, self.starts = ids, starts
        self.device_exact = arrays.zeros((batch,), "int32")
        self.device_packed = arrays.zeros((batch,), "int32")
        self.page_table = arrays.zeros(ids.shape, "int64")
        arrays.assign(self.page_table, pool.addresses(ids))
        self._layout = pool.layout
        self._addressable = arrays.addressable
        self._stale = True
        self._table: PageTable | None = None
        self.set_lengths(exact, packed, seen)

    @classmethod
    def empty(cls, batch: int, arrays: Arrays, pool: PagePool) -> RowTable:
        """A table of rows without tokens."""
        none = np.zeros((batch, 0), np.int64)
        exact, packed, seen = np.zeros((3, batch), np.int64)
        return cls(arrays, pool, exact, packed, seen, none, none)

    @property
    def batch(self) -> int:
        return len(self.exact)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(self.arrays.nbytes(x) for x in (self.page_table, self.device_exact, self.device_packed))

    @property
    def table(self) -> PageTable | None:
        """The packed tokens of all rows, or None without any."""
        if self._stale or self._layout != self.pool.layout or not self._addressable:
            self.sync()
        return self._table

    def sync(self) -> None:
        """Brings the device's arrays up to date after a call that failed, and where the pool grew or moved pages."""
        layout = self.pool.layout
        if self._stale or self._layout != layout:
            self.arrays.assign(self.page_table, self.pool.addresses(self.ids))
            self._layout = layout
            if self._stale:
                self.set_lengths(self.exact, self.packed, self.seen)
        table = self._table
        if table is not None and table.base is not self.pool.base:
            self._table = replace(table, base=self.pool.base)

    def row_table(self, row: int) -> PageTable | None:
        """The packed tokens of one row, as a batch of one; None without any."""
        self.sync()
        one, packed = slice(row, row + 1), int(self.packed[row])
        return (
            PageTable(self.pool.base, self.page_table[one], self.device_packed[one], packed, True) if packed else None
        )

    def row_pages(self, row: int) -> Ids:
        """The row's pages, [pages]."""
        return self.ids[row, : self.packed[row] // PAGE]

    def row_starts(self, row: int) -> I64:
        """Position of the first token of each of the row's pages, [pages]."""
        return self.starts[row, : self.packed[row] // PAGE]

    def pages_seen(self, row: int) -> int:
        """Pages that a row has filled so far, those included that were evicted or are another process's."""
        return int(self.seen[row] - self.exact[row]) // PAGE

    def pages(self) -> Ids:
        """The pages of all rows, one row after the other."""
        return self.ids[np.arange(self.ids.shape[1]) < self.packed[:, None] // PAGE]

    def set_lengths(self, exact: I64, packed: I64, seen: I64) -> None:
        """Gives the rows new lengths, of which arrays are kept."""
        self._stale = True
        self.arrays.assign(self.device_exact, exact.astype(np.int32))
        self.arrays.assign(self.device_packed, packed.astype(np.int32))
        self.note(exact, packed, seen)
        self._stale = False

    def grow(self, n: int) -> None:
        """Adds n exact tokens to every row."""
        exact, seen, most = self.exact + n, self.seen + n, self.most_exact + n
        self._stale = True
        self.device_exact += n
        self.exact, self.seen, self.most_exact, self._stale = exact, seen, most, False

    def count(self, n: int) -> None:
        """Takes note of n exact tokens in every row that the device has already."""
        self.exact, self.seen, self.most_exact = self.exact + n, self.seen + n, self.most_exact + n

    def note(self, exact: I64, packed: I64, seen: I64) -> None:
        """Takes note of lengths that the device has already, as a replayed graph counts there."""
        most_exact, most_packed = int(exact.max(initial=0)), int(packed.max(initial=0))
        same = bool((packed == most_packed).all())
        uniform = same and bool((exact == most_exact).all())
        table = None
        if most_packed:
            table = PageTable(self.pool.base, self.page_table, self.device_packed, most_packed, same)
        self.exact, self.packed, self.seen, self._table = exact, packed, seen, table
        self.most_exact, self.most_packed, self.uniform = most_exact, most_packed, uniform

    def reserve(self, pages: int) -> None:
        """Widens the table to `pages` pages a row. The page table on the device is then another array."""
        if pages <= self.ids.shape[1]:
            return
        wide = [np.pad(x, ((0, 0), (0, pages - x.shape[1]))) for x in (self.ids, self.starts)]
        page_table = self.arrays.zeros((self.batch, pages), "int64")
        self.arrays.assign(page_table, self.pool.addresses(wide[0]))
        table = None if self._table is None else replace(self._table, page_table=page_table)
        (self.ids, self.starts), self.page_table, self._table = wide, page_table, table

    def place(self, row: int, first: int, ids: Ids, starts: I64) -> None:
        """Writes pages into a row from its page `first` on, past its last; `set_lengths` makes them part of it."""
        at = row, slice(first, first + len(ids))
        self.ids[at], self.starts[at] = ids, starts
        self.arrays.assign(self.page_table, self.pool.addresses(ids), at)

    def remove(self, row: int, gone: NDArray[np.bool_]) -> Ids:
        """Takes the pages of a row where `gone` [pages] says so out of it, and gives them."""
        ids, starts = self.row_pages(row), self.row_starts(row)
        out = ids[gone]
        self._replace(row, ids[~gone], starts[~gone])
        return out

    def insert(self, row: int, ids: Ids, starts: I64) -> None:
        """Adds pages to a row at the places that their positions give."""
        ids, starts = np.concatenate([self.row_pages(row), ids]), np.concatenate([self.row_starts(row), starts])
        order = np.argsort(starts, kind="stable")
        self._replace(row, ids[order], starts[order])

    def _replace(self, row: int, ids: Ids, starts: I64) -> None:
        self.reserve(len(ids))
        self.sync()
        at = row, slice(len(ids))
        all_ids, all_starts, packed = self.ids.copy(), self.starts.copy(), self.packed.copy()
        all_ids[at], all_starts[at], packed[row] = ids, starts, PAGE * len(ids)
        self._stale = True
        self.arrays.assign(self.page_table, self.pool.addresses(ids), at)
        self.arrays.assign(self.device_packed, packed.astype(np.int32))
        self.ids, self.starts = all_ids, all_starts
        self.note(self.exact, packed, self.seen)
        self._stale = False

    def take(self, index: I64) -> RowTable:
        """A table whose row i is row `index[i]` of this one."""
        contents = (x[index] for x in (self.exact, self.packed, self.seen, self.ids, self.starts))
        return RowTable(self.arrays, self.pool, *contents)

    def joined(self, other: RowTable, ids: Ids) -> RowTable:
        """A table of this one's rows and another's, whose pages in this one's pool are `ids`, like `other.ids`."""
        width = max(self.ids.shape[1], ids.shape[1])
        wide = (
            np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in pair])
            for pair in ((self.ids, ids), (self.starts, other.starts))
        )
        lengths = zip((self.exact, self.packed, self.seen), (other.exact, other.packed, other.seen))
        return RowTable(self.arrays, self.pool, *(np.append(*pair) for pair in lengths), *wide)
