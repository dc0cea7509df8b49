"""The rows of a layer's cache: where their pages and exact tokens lie, and rows that are copied, joined and removed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..codec import PAGE, Codec
from ..ops.arrays import FLOATS
from ..ops.table import ExactTokens, PageTable
from ..sparse import SparseLayer, SparseStep
from .arrays import Arrays
from .pool import Ids, PagePool

if TYPE_CHECKING:
    from .layer import LayerCache

I64 = NDArray[np.int64]


class Rows:
    """What `LayerCache` holds, without what comes in, leaves in pages and is attended to; arguments as there."""

    _exact: I64
    _packed: I64
    _seen: I64
    _uniform: bool
    _exact_max: int
    _exact_tokens: ExactTokens
    _table: PageTable | None
    _exact_device: Any
    _packed_device: Any
    _rows: Any

    def __init__(
        self,
        codec: Codec,
        batch: int,
        arrays: Arrays,
        dtype: str = "float32",
        *,
        pool: PagePool | None = None,
        max_pages: int | None = None,
        backend: str = "auto",
    ) -> None:
        if batch < 0 or dtype not in FLOATS:
            raise ValueError(f"[cache] expected batch >= 0 and dtype in {FLOATS}; got {batch}, {dtype!r}")
        if pool is not None and pool.page_bytes != codec.page_bytes:
            raise ValueError(f"[cache] expected a pool of {codec.page_bytes} byte pages; got {pool.page_bytes}")
        self.codec = codec
        self.arrays = arrays
        self.dtype = dtype
        self.backend = backend
        self.pool = PagePool(codec.page_bytes, arrays, max_pages) if pool is None else pool
        self.sparse: SparseLayer | None = None
        self.sparse_step: SparseStep | None = None
        self._flush_at = codec.spec.sinks + codec.spec.window + PAGE
        shape = (batch, codec.kv_heads, self._flush_at, codec.head_dim)
        self._k, self._v = arrays.zeros(shape, dtype), arrays.zeros(shape, dtype)
        self._steps = arrays.index(np.arange(self._flush_at))
        self._ids = np.zeros((batch, 0), np.int64)
        self._starts = np.zeros((batch, 0), np.int64)
        self._offsets = arrays.zeros((batch, 0), "int64")
        self._layout = self.pool.layout
        self._set_lengths(*np.zeros((3, batch), np.int64))

    @property
    def batch(self) -> int:
        return len(self._exact)

    @property
    def lengths(self) -> I64:
        """Tokens that each row has come to, evicted ones included, on the host, [batch]."""
        return self._seen.copy()

    @property
    def packed_lengths(self) -> I64:
        """Packed tokens of each row, on the host, [batch]."""
        return self._packed.copy()

    @property
    def exact_lengths(self) -> I64:
        """Exact tokens of each row, sinks and recent, on the host, [batch]."""
        return self._exact.copy()

    @property
    def uniform(self) -> bool:
        """Whether all rows hold the same numbers of packed and exact tokens."""
        return self._uniform

    @property
    def nbytes(self) -> int:
        """Bytes allocated: pages (shared and spare ones included), exact tokens, tables, lengths."""
        held = (self._k, self._v, self._offsets, self._exact_device, self._packed_device)
        return self.pool.nbytes + sum(self.arrays.nbytes(a) for a in held)

    @property
    def table(self) -> PageTable | None:
        """The packed tokens, or None without any."""
        self._find_pages()
        return self._table

    def _find_pages(self) -> None:
        """Follows the pool where another cache made it grow, or where it moved its pages."""
        if self._layout != self.pool.layout:
            self.arrays.assign(self._offsets, self.pool.addresses(self._ids))
            self._layout = self.pool.layout
        if self._table is not None and self._table.base is not self.pool.base:
            self._table = replace(self._table, base=self.pool.base)

    @property
    def exact(self) -> ExactTokens:
        """The exact tokens of each row, sinks first."""
        return self._exact_tokens

    def row(self, row: int) -> tuple[PageTable | None, ExactTokens]:
        """The packed and the exact tokens of one row, as a batch of one."""
        self._find_pages()
        rows, packed, exact = slice(row, row + 1), int(self._packed[row]), int(self._exact[row])
        table = (
            PageTable(self.pool.base, self._offsets[rows], self._packed_device[rows], packed, True) if packed else None
        )
        return table, ExactTokens(self._k[rows], self._v[rows], self._exact_device[rows], exact)

    def row_pages(self, row: int) -> Ids:
        """The row's pages in the pool, [pages]."""
        return self._ids[row, : self._packed[row] // PAGE]

    def page_starts(self, row: int) -> I64:
        """Position of the first token of each of the row's pages, ascending, [pages]."""
        return self._starts[row, : self._packed[row] // PAGE]

    def evict(self, row: int, gone: NDArray[np.bool_]) -> None:
        """Removes the packed pages of a row where `gone` [pages] says so. The other pages' records are not touched."""
        count = len(self.row_pages(row))
        if gone.shape != (count,) or gone.dtype != np.bool_:
            raise ValueError(f"[cache.evict] expected bool [{count}]; got {gone.dtype} {list(gone.shape)}")
        ids, starts = self.row_pages(row).copy(), self.page_starts(row).copy()
        self._set_pages(row, ids[~gone], starts[~gone])
        self.pool.free(ids[gone])

    def insert(self, row: int, ids: Ids, starts: I64) -> None:
        """Gives a row pages of the pool, whose references it takes over, at the places that their positions give."""
        ids = np.concatenate([self.row_pages(row), ids])
        starts = np.concatenate([self.page_starts(row), starts])
        order = np.argsort(starts, kind="stable")
        self._set_pages(row, ids[order], starts[order])

    def _set_pages(self, row: int, ids: Ids, starts: I64) -> None:
        count = len(ids)
        if count > self._ids.shape[1]:
            self._widen(count)
        self._ids[row, :count], self._starts[row, :count] = ids, starts
        self._find_pages()
        self.arrays.assign(self._offsets, self.pool.addresses(ids), (row, slice(count)))
        packed = self._packed.copy()
        packed[row] = count * PAGE
        self._set_lengths(self._exact, packed, self._seen)

    def select(self, rows: Iterable[int]) -> None:
        """Makes row i what row `rows[i]` was: reorders, repeats and removes rows (beam search, a batch row that
        leaves). Pages are shared, not copied.

        Raises:
            ValueError: a row that is not there.
        """
        index = self._row_index(rows)
        old = [self.row_pages(row) for row in range(self.batch)]
        for row in index.tolist():
            self.pool.share(old[row])
        for ids in old:
            self.pool.free(ids)
        take = self.arrays.take
        self._k, self._v, self._offsets = take(self._k, index), take(self._v, index), take(self._offsets, index)
        self._ids, self._starts = self._ids[index], self._starts[index]
        self._set_lengths(self._exact[index], self._packed[index], self._seen[index])

    def fork(self, rows: Iterable[int] | None = None) -> LayerCache:
        """A cache of the given rows (default: all) that shares this one's pages; either may change without the
        other."""
        index = self._row_index(range(self.batch) if rows is None else rows)
        other = self.empty(0, self.pool)
        other.sparse = self.sparse
        take = self.arrays.take
        other._k, other._v, other._offsets = take(self._k, index), take(self._v, index), take(self._offsets, index)
        other._ids, other._starts, other._layout = self._ids[index], self._starts[index], self._layout
        for row in index.tolist():
            self.pool.share(self.row_pages(row))
        other._set_lengths(self._exact[index], self._packed[index], self._seen[index])
        return other

    def check_join(self, other: LayerCache) -> None:
        """Raises what `join` would raise."""
        codec, theirs = self.codec.fingerprint, other.codec.fingerprint
        if codec != theirs or other.dtype != self.dtype or not self.arrays.owns(other._k):
            raise ValueError(
                f"[cache.join] expected codec {codec}, {self.dtype} and this device; got {theirs}, {other.dtype}, "
                f"{type(other._k).__name__}"
            )
        total = int((other._packed // PAGE).sum())
        if other.pool is not self.pool and self.pool.max_pages is not None:
            room = self.pool.max_pages - self.pool.in_use
            if total > room:
                raise ValueError(f"[cache.join] expected at most {room} more pages; got {total}")

    def join(self, other: LayerCache) -> None:
        """Adds the rows of another cache behind this one's. Pages of the same pool are shared, others copied.

        Raises:
            ValueError: another codec, dtype or device; a full pool.
        """
        self.check_join(other)
        total = int((other._packed // PAGE).sum())
        if other.pool is self.pool:
            for row in range(other.batch):
                self.pool.share(other.row_pages(row))
            ids = other._ids
        else:
            new = self.pool.alloc(total)
            ids, at = np.zeros_like(other._ids), 0
            for row in range(other.batch):
                for i, page in enumerate(other.row_pages(row).tolist()):
                    ids[row, i] = new[at]
                    self.pool.write(int(new[at]), other.pool.page(page))
                    at += 1
        width = max(self._ids.shape[1], ids.shape[1])
        self._ids = np.concatenate([_widen(self._ids, width), _widen(ids, width)])
        self._starts = np.concatenate([_widen(x, width) for x in (self._starts, other._starts)])
        buffers = []
        for ours, theirs in ((self._k, other._k), (self._v, other._v)):
            both = self.arrays.empty((self.batch + other.batch, *ours.shape[1:]), self.dtype)
            both[: self.batch], both[self.batch :] = ours, theirs
            buffers.append(both)
        self._k, self._v = buffers
        self._offsets = self.arrays.zeros(self._ids.shape, "int64")
        self.arrays.assign(self._offsets, self.pool.addresses(self._ids))
        self._layout = self.pool.layout
        self._set_lengths(*(np.append(a, b) for a, b in zip(self._host_lengths, other._host_lengths)))

    def restore(
        self, ids: Ids, table: I64, starts: I64, lengths: tuple[I64, I64, I64], k: NDArray[Any], v: NDArray[Any]
    ) -> None:
        """Gives an empty cache its contents: host arrays as `storage` keeps them.

        Args:
            ids: pages of the pool, to which references are added.
            table: [batch, most pages], indices into `ids`.
            starts: position of each page's first token, like `table`.
            lengths: exact and packed tokens of each row, and all that it has come to.
            k, v: exact tokens [batch, kv_heads, most exact tokens, head_dim].
        """
        self._ids = ids[np.maximum(table, 0)] if len(ids) else np.zeros((self.batch, 0), np.int64)
        self._starts = starts.copy() if len(ids) else self._ids.copy()
        self._offsets = self.arrays.zeros(self._ids.shape, "int64")
        self.arrays.assign(self._offsets, self.pool.addresses(self._ids))
        for buffer, tokens in ((self._k, k), (self._v, v)):
            self.arrays.assign(buffer, tokens, (slice(None), slice(None), slice(tokens.shape[2])))
        self._layout = self.pool.layout
        self._set_lengths(*(x.copy() for x in lengths))
        for row in range(self.batch):
            self.pool.share(self.row_pages(row))

    def __copy__(self) -> LayerCache:
        return self.fork()

    def __deepcopy__(self, memo: object) -> LayerCache:
        return self.fork()

    def __reduce__(self) -> NoReturn:
        raise TypeError("[cache] expected forgeattention.cache.save; got pickle, which cannot follow page addresses")

    def __del__(self) -> None:
        if hasattr(self, "_exact") and not sys.is_finalizing():
            for row in range(self.batch):
                self.pool.free(self.row_pages(row))
            self._packed = np.zeros_like(self._packed)

    def _widen(self, width: int) -> None:
        self._ids, self._starts = _widen(self._ids, width), _widen(self._starts, width)
        offsets = self.arrays.zeros((self.batch, width), "int64")
        offsets[:, : self._offsets.shape[1]] = self._offsets
        self._offsets = offsets

    @property
    def _host_lengths(self) -> tuple[I64, I64, I64]:
        return self._exact, self._packed, self._seen

    def _set_lengths(self, exact: I64, packed: I64, seen: I64) -> None:
        self._exact, self._packed, self._seen = exact, packed, seen
        if not hasattr(self, "_exact_device") or self._exact_device.shape[0] != len(exact):
            self._exact_device = self.arrays.zeros((len(exact),), "int32")
            self._packed_device = self.arrays.zeros((len(exact),), "int32")
            self._rows = self.arrays.index(np.arange(len(exact)))[:, None]
        self.arrays.assign(self._exact_device, exact.astype(np.int32))
        self.arrays.assign(self._packed_device, packed.astype(np.int32))
        self._exact_max, most = int(exact.max(initial=0)), int(packed.max(initial=0))
        self._uniform = len(exact) == 0 or bool((exact == exact[0]).all() and (packed == packed[0]).all())
        self._exact_tokens = ExactTokens(self._k, self._v, self._exact_device, self._exact_max)
        even = bool((packed == most).all())
        self._table = PageTable(self.pool.base, self._offsets, self._packed_device, most, even) if most else None

    def _row_index(self, rows: Iterable[int]) -> I64:
        index = np.fromiter(rows, np.int64)
        if (index < 0).any() or (index >= self.batch).any():
            raise ValueError(f"[cache.select] expected rows in [0, {self.batch}); got {index.tolist()}")
        return index

    def empty(self, rows: int, pool: PagePool) -> LayerCache:
        """A cache like this one with empty rows and the given pool."""
        raise NotImplementedError


def _widen(ids: Ids, width: int) -> Ids:
    return np.pad(ids, ((0, 0), (0, width - ids.shape[1])))
