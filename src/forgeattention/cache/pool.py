"""Storage of pages: slabs, reference counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import ops
from .arrays import Arrays

Ids = NDArray[np.int64]

GROWTH = 128
"""A pool grows by at least 1 / GROWTH of its pages, so that the spare room stays under one per cent."""
GROWTH_COPIED = 8
"""The same where growth copies: the spare room stays under an eighth, and a page is copied about 8 times in all."""


@dataclass
class _Slab:
    data: Any
    base: int
    free: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


class PagePool:
    """Pages of one layer, shared by any number of sequences.

    A page is written once, before anything else reads it, and never changed: sequences share pages by reference count
        and copy none. Growth adds a slab and copies nothing; a slab without a used page is given back. Not safe for
        use by several threads or device streams at once.

    Args:
        page_bytes: bytes of a page.
        arrays: framework and device of the pages.
        max_pages: most pages in use at a time, or None.

    Attributes:
        notes: what users remember of pages, by page; forgotten with the page.
        layout: changes when pages move, so that their addresses must be asked for again.
    """

    def __init__(self, page_bytes: int, arrays: Arrays, max_pages: int | None = None) -> None:
        if page_bytes < 1 or (max_pages is not None and max_pages < 0):
            raise ValueError(f"[page_pool] expected page_bytes >= 1, max_pages >= 0; got {page_bytes}, {max_pages}")
        self.page_bytes = page_bytes
        self.arrays = arrays
        self.max_pages = max_pages
        self._slabs: list[_Slab] = []
        self._open: list[_Slab] = []
        self._slab_of: dict[int, _Slab] = {}
        self._refs = np.zeros(16, np.int32)
        self._addresses = np.zeros(16, np.int64)
        self._spare_ids = list(range(15, -1, -1))
        self.in_use = 0
        self.notes: dict[int, Any] = {}
        self.layout = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare pages included."""
        return sum(self.arrays.nbytes(slab.data) for slab in self._slabs)

    @property
    def base(self) -> Any | None:
        """The array that `addresses` count from, or None where they are absolute. Growth replaces it."""
        return None if self.arrays.addressable or not self._slabs else self._slabs[0].data

    def alloc(self, count: int) -> Ids:
        """Takes `count` pages, each with one reference.

        Raises:
            ValueError: more than `max_pages` would be in use; nothing has changed.
        """
        if self.max_pages is not None and self.in_use + count > self.max_pages:
            raise ValueError(
                f"[page_pool] expected at most {self.max_pages} pages; got {self.in_use} in use and {count} more wanted"
            )
        missing = count - sum(len(slab.free) for slab in self._open)
        if missing > 0:
            self._grow(missing)
        ids: list[int] = []
        while len(ids) < count:
            slab = self._open[0]
            take = min(count - len(ids), len(slab.free))
            ids += slab.free[:take]
            del slab.free[:take]
            if not slab.free:
                self._open.pop(0)
        out = np.array(ids, np.int64)
        self._refs[out] = 1
        self.in_use += count
        return out

    def share(self, ids: Ids) -> None:
        """Adds a reference to each page."""
        np.add.at(self._refs, ids, 1)

    def free(self, ids: Ids) -> None:
        """Drops a reference to each page; a page without one is free."""
        np.subtract.at(self._refs, ids, 1)
        for page in np.unique(ids[self._refs[ids] == 0]).tolist():
            slab = self._slab_of[page]
            if not slab.free:
                self._open.append(slab)
            slab.free.append(page)
            self.in_use -= 1
            self.notes.pop(page, None)
            if len(slab.free) == len(slab.ids):
                self._drop(slab)

    @property
    def spare(self) -> int:
        """Pages allocated and not in use."""
        return sum(len(slab.free) for slab in self._slabs)

    def compact(self, backend: str = "auto") -> None:
        """Moves the pages in use together, byte for byte, and gives back the memory of the others. Needs room for one
        copy of the pages in use.

        Args:
            backend: that of `ops.compact`.

        Raises:
            ValueError: the backend cannot move pages; nothing is changed then.
        """
        used = [page for slab in self._slabs for page in slab.ids if self._refs[page]]
        if not self.spare:
            return
        moved = None
        if used:
            at = self.arrays.index(self._addresses[used])
            moved = ops.compact(self.base, at, self.page_bytes, backend=backend).reshape(-1)
        for slab in list(self._slabs):
            self._drop(slab)
        self.layout += 1
        if moved is None:
            return
        base = self.arrays.address(moved) if self.arrays.addressable else 0
        slab, kept = _Slab(moved, base, ids=used), set(used)
        self._spare_ids = [page for page in self._spare_ids if page not in kept]
        self._addresses[used] = base + self.page_bytes * np.arange(len(used))
        self._slab_of.update(dict.fromkeys(used, slab))
        self._slabs.append(slab)

    def references(self, ids: Ids) -> NDArray[np.int32]:
        return self._refs[ids]

    def addresses(self, ids: Ids) -> NDArray[np.int64]:
        """Byte address of each page: absolute, or from the start of `base`."""
        return self._addresses[ids]

    def page(self, page: int) -> Any:
        """uint8 [page_bytes]; a view where pages have addresses."""
        slab, at = self._find(page)
        return slab.data[at]

    def write(self, page: int, data: Any) -> None:
        """Fills a page that nothing has read yet from uint8 [page_bytes], on the pool's device or the host."""
        slab, at = self._find(page)
        if self.arrays.owns(data):
            slab.data[at] = data
        else:
            self.arrays.assign(slab.data, data, at)

    def _find(self, page: int) -> tuple[_Slab, slice]:
        slab = self._slab_of[page]
        start = int(self._addresses[page]) - slab.base
        return slab, slice(start, start + self.page_bytes)

    def _grow(self, missing: int) -> None:
        growth = GROWTH if self.arrays.addressable else GROWTH_COPIED
        pages = max(missing, self.in_use // growth)
        if self.max_pages is not None:
            pages = max(missing, min(pages, self.max_pages - self.in_use))
        data = self.arrays.empty((pages * self.page_bytes,), "uint8")
        if self.arrays.addressable:
            self._add(_Slab(data, self.arrays.address(data)), pages, 0)
        elif not self._slabs:
            self._add(_Slab(data, 0), pages, 0)
        else:
            slab = self._slabs[0]
            slab.data = self.arrays.concat([slab.data, data], 0)
            self._add(slab, pages, len(slab.ids))

    def _add(self, slab: _Slab, pages: int, first: int) -> None:
        """Takes the slab's pages from the `first` on into use."""
        while len(self._spare_ids) < pages:
            known = len(self._refs)
            self._refs = np.append(self._refs, np.zeros_like(self._refs))
            self._addresses = np.append(self._addresses, np.zeros_like(self._addresses))
            self._spare_ids += range(2 * known - 1, known - 1, -1)
        ids = [self._spare_ids.pop() for _ in range(pages)]
        self._addresses[ids] = slab.base + self.page_bytes * np.arange(first, first + pages)
        self._slab_of.update(dict.fromkeys(ids, slab))
        if not slab.free:
            self._open.append(slab)
        slab.ids += ids
        slab.free += ids
        if not first:
            self._slabs.append(slab)

    def _drop(self, slab: _Slab) -> None:
        self._slabs = [s for s in self._slabs if s is not slab]
        self._open = [s for s in self._open if s is not slab]
        for page in slab.ids:
            del self._slab_of[page]
        self._spare_ids += slab.ids
