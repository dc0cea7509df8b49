"""The cache of one layer: exact sinks, packed pages, exact recent tokens, for a batch of rows of any length."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..codec import PAGE, Codec
from ..ops.arrays import FLOATS, dtype_of, is_torch
from ..ops.table import ExactTokens, PageTable
from . import pieces
from .append import Keep, append, append_rows, check_append
from .arrays import Arrays, arrays_of
from .edit import check_join, fork_rows, join_rows
from .exact import ExactBuffer
from .pool import Ids, PagePool
from .rows import I64, RowTable
from .strategies import PageEviction, PageSharding, SparseReading, check_strategies


class LayerCache:
    """Keys and values of one layer for a batch of rows.

    A row is [sinks | packed pages | recent tokens]. The first `spec.sinks` tokens and the newest `spec.window` to
    `spec.window` + 63 are exact; when `spec.window` + 64 recent tokens would be held, the oldest leave in pages of
    64. What a row holds depends only on what was appended to, trimmed and evicted from it. Each page knows its
    position, so that pages may be missing. A call that raises leaves the cache as it was.

    The lengths and the page table lie on the device and are mirrored on the host; appending and attending one token
    waits for no device.

    Args:
        codec: the layer's codec.
        batch: rows, all empty.
        arrays: framework and device; see `arrays_of`.
        dtype: of the exact tokens: "float32", "float16" or "bfloat16".
        pool: pages shared with other caches of the same codec, or None for an own pool.
        max_pages: most pages of an own pool.
        backend: which kernels encode and attend, "auto" or a name of `ops`.
        sparse: which packed tokens `attend` reads; None for all.
        eviction: which pages rows give up; None for none.
        sharding: which pages this process keeps; None for all.

    Attributes:
        rows: lengths and pages.
        buffer: the exact tokens.
        sparse_step: what the last call of `attend` left out; None for nothing.
        undo: how to go back behind a page that the last call packed; None where that cannot be.

    Raises:
        ValueError: a batch, dtype or pool that does not fit, or strategies that do not go together.
    """

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
        sparse: SparseReading | None = None,
        eviction: PageEviction | None = None,
        sharding: PageSharding | None = None,
    ) -> None:
        if batch < 0 or dtype not in FLOATS:
            raise ValueError(f"[cache] expected batch >= 0 and dtype in {FLOATS}; got {batch}, {dtype!r}")
        if pool is not None and pool.page_bytes != codec.page_bytes:
            raise ValueError(f"[cache] expected a pool of {codec.page_bytes} byte pages; got {pool.page_bytes}")
        check_strategies(sparse=sparse, eviction=eviction, sharding=sharding)
        if sharding is not None:
            sharding.check_rows(None, batch)
        self.codec = codec
        self.arrays = arrays
        self.dtype = dtype
        self.backend = backend
        self.pool = PagePool(codec.page_bytes, arrays, max_pages) if pool is None else pool
        self.sparse = sparse
        self.sharding = sharding
        self.sparse_step: Any = None
        self.undo: pieces.Undo | None = None
        self._prepared: tuple[Any, ops.PreparedDecode] | None = None
        capacity = codec.spec.sinks + codec.spec.window + PAGE
        self.buffer = ExactBuffer.empty(arrays, (batch, codec.kv_heads, capacity, codec.head_dim), dtype)
        if eviction is not None:
            eviction.attach(self)
        self.eviction = eviction
        self.rows = RowTable.empty(batch, arrays, self.pool)

    @classmethod
    def like(cls, k: Any, codec: Codec, **options: Any) -> LayerCache:
        """An empty cache for keys such as `k` [batch, kv_heads, tokens, head_dim]; `options` as for the constructor."""
        arrays = arrays_of(k)
        return cls(codec, k.shape[0], arrays, dtype_of(k), **options)

    def empty(self, rows: int, pool: PagePool) -> LayerCache:
        """A cache like this one with empty rows and the given pool."""
        eviction = None if self.eviction is None else self.eviction.empty(rows)
        strategies: dict[str, Any] = {"sparse": self.sparse, "eviction": eviction, "sharding": self.sharding}
        return LayerCache(self.codec, rows, self.arrays, self.dtype, pool=pool, backend=self.backend, **strategies)

    def adopt(self, codec: Codec) -> None:
        """Takes a codec that reads the same pages and codes new ones.

        Raises:
            ValueError: one that reads pages otherwise.
        """
        if codec.fingerprint != self.codec.fingerprint:
            raise ValueError(f"[cache.adopt] expected codec {self.codec.fingerprint}; got {codec.fingerprint}")
        self.codec = codec

    @property
    def batch(self) -> int:
        return len(self.rows.exact)

    @property
    def lengths(self) -> I64:
        """Tokens that each row has come to, evicted ones included, on the host, [batch]."""
        return self.rows.seen.copy()

    @property
    def packed_lengths(self) -> I64:
        """Packed tokens of each row, on the host, [batch]."""
        return self.rows.packed.copy()

    @property
    def exact_lengths(self) -> I64:
        """Exact tokens of each row, sinks and recent, on the host, [batch]."""
        return self.rows.exact.copy()

    @property
    def nbytes(self) -> int:
        """Bytes allocated: pages (shared and spare ones included), exact tokens, tables, lengths."""
        kept = 0 if self.undo is None else self.undo.before.buffer.nbytes
        return self.pool.nbytes + self.buffer.nbytes + self.rows.nbytes + kept

    @property
    def table(self) -> PageTable | None:
        """The packed tokens, or None without any."""
        return self.rows.table

    @property
    def exact(self) -> ExactTokens:
        """The exact tokens of each row, sinks first."""
        return self.buffer.tokens(self.rows)

    def row(self, row: int) -> tuple[PageTable | None, ExactTokens]:
        """The packed and the exact tokens of one row, as a batch of one."""
        return self.rows.row_table(row), self.buffer.row_tokens(self.rows, row)

    def row_pages(self, row: int) -> Ids:
        """The row's pages in the pool, [pages]."""
        return self.rows.row_pages(row)

    def page_starts(self, row: int) -> I64:
        """Position of the first token of each of the row's pages, ascending, [pages]."""
        return self.rows.row_starts(row)

    def is_step(self, n: int, keep: Keep | None = None) -> bool:
        """Whether n new tokens are attended to by one call of `ops.decode_attention` over all that is then held. Else
        they come in several such calls, or are a chunk, which attends to itself exactly; see `pieces`."""
        return pieces.is_step(self, n, keep)

    def step(
        self, q: Any, k: Any, v: Any, scale: float, *, keep: Keep | None = None, sink_logits: Any | None = None
    ) -> Any:
        """Appends new tokens and attends to the whole of each row, causally.

        Args:
            q: [batch, q_heads, m, head_dim], the queries of the last m new tokens.
            k, v: [batch, kv_heads, n, head_dim] in the cache's dtype, on its device.
            scale: softmax scale.
            keep: bool [batch, n] on the host: which tokens are real; None for all.
            sink_logits: float32 [q_heads], extra logits without a value; None for none.

        Returns:
            [batch, q_heads, m, head_dim] in q's dtype; means nothing where a token is not real.

        Raises:
            ValueError: as `append`; nothing has changed.
        """
        return pieces.step(self, q, k, v, scale, keep, sink_logits)

    def attend_chunk(
        self, q: Any, k: Any, v: Any, scale: float, *, keep: Keep | None = None, sink_logits: Any | None = None
    ) -> Any:
        """Attention of new tokens that are no step, and are not appended; arguments and result as of `step`."""
        return pieces.attend(self, q, k, v, scale, keep, sink_logits)

    def prepare(self, q: Any, scale: float, n: int, keep: Keep | None = None) -> None:
        """Told, before `append`, of the queries q [batch, q_heads, m, head_dim] of the last m of n tokens to come (real
        where `keep` [batch, n] says so); a cache that evicts may recall pages. `step` does it by itself."""
        if self.eviction is not None:
            self.eviction.prepare(self, q, scale, n, keep)

    def check(self, k: Any, v: Any, keep: Keep | None = None) -> Callable[[], int]:
        """Checks the arguments of `append` now, all but room in the pool and values. The function that it returns
        waits for the device, raises if k or v hold NaN or infinity, and returns n; call it after other work."""
        return check_append(self, k, v, keep)

    def append(self, k: Any, v: Any, keep: Keep | None = None, confirm: Callable[[], int] | None = None) -> None:
        """Adds tokens to every row.

        A long append is encoded from `k` and `v` where they lie; no copy of them is kept.

        Args:
            k, v: [batch, kv_heads, n, head_dim] in the cache's dtype, on its device, the last axis contiguous.
            keep: bool [batch, n] on the host: which tokens are real; None for all.
            confirm: what `check` gave for the same arguments, where it was called before.

        Raises:
            ValueError: a wrong shape, dtype or device; NaN or infinity (off the CPU this is looked for where more
                than 8 tokens are appended, and else left to the encoder); a full pool.
        """
        n = (confirm or check_append(self, k, v, keep))()
        self.undo = None
        if self.eviction is None:
            append(self, k, v, keep, n)
        else:
            with self.eviction.rounds(self):
                append(self, k, v, keep, n)

    def make_room(self, n: int) -> None:
        """Packs what would leave the rows if `n` more tokens came.

        Raises:
            ValueError: a full pool.
        """
        none = self.buffer.k[:, :, :0], self.buffer.v[:, :, :0]
        if self.eviction is None:
            append_rows(self, *none, None, n)
        else:
            with self.eviction.rounds(self):
                append_rows(self, *none, None, n)

    def reserve(self, tokens: int) -> None:
        """Widens the page table to `tokens` packed tokens a row, so that it stays where it is until then."""
        self.rows.reserve(-(-tokens // PAGE))

    def attend(self, q: Any, scale: float, *, causal: bool = True, sink_logits: Any = None) -> tuple[Any, Any]:
        """`ops.decode_attention` of q [batch, q_heads, n, head_dim] over the whole cache; with `sparse` over what
        matters of the rows that are long enough for it."""
        self.sparse_step = None
        if self.sharding is not None:
            return self.sharding.attend(self, q, scale, causal, sink_logits)
        rows, sparse = self.rows, self.sparse
        table, exact = rows.table, self.buffer.tokens(rows)
        if sparse is None or table is None or (dense := rows.packed < max(sparse.min_context, 1)).all():
            return self._attend(q, table, exact, scale, causal, sink_logits)
        out, lse, self.sparse_step = sparse.attend(
            q, self.codec, table, exact, scale, causal, sink_logits, self.backend
        )
        if dense.any():  # a row's result is the same in any batch
            at = self.arrays.index(np.flatnonzero(dense))
            whole, whole_lse = self._attend(q, table, exact, scale, causal, sink_logits)
            out[at], lse[at] = whole[at], whole_lse[at]
        return out, lse

    def _attend(self, q: Any, table: Any, exact: Any, scale: float, causal: bool, sink_logits: Any) -> tuple[Any, Any]:
        # Steps are alike, so that most are checked by one look at what the last was.
        asked = q.shape[1:], q.dtype, q.device if is_torch(q) else None, scale, causal, sink_logits is None, self.codec
        if self._prepared is None or self._prepared[0] != asked or sink_logits is not None:
            prepared = ops.PreparedDecode(
                q, self.codec, table, exact, scale, causal=causal, sink_logits=sink_logits, backend=self.backend
            )
            self._prepared = asked, prepared
        return self._prepared[1](q, table, exact)

    def attend_packed(self, q: Any, table: PageTable | None, scale: float) -> tuple[Any, Any] | None:
        """`ops.prefill_attention` of q over `table`, this cache's or one row's packed tokens; None without any."""
        if self.sharding is not None:
            return self.sharding.attend_packed(self, q, table, scale)
        return None if table is None else ops.prefill_attention(q, self.codec, table, scale, backend=self.backend)

    def trim(self, n: int | Sequence[int] | I64) -> None:
        """Removes the newest `n` tokens of each row (one number, or one per row), evicted ones counted.

        Where the cut falls inside a page, the page's remaining tokens return from their codes as exact ones. They keep
        the error that the codes had, and when they are packed again it adds a second one. A page that left in the last
        `step` of several tokens for one of those that go now comes back as it was.

        Raises:
            ValueError: a negative number, or more tokens than a row has.
        """
        pieces.trim(self, n)

    def clear(self) -> None:
        """Removes all tokens; the rows stay."""
        self.trim(self.rows.seen)

    def evict(self, row: int, gone: NDArray[np.bool_]) -> None:
        """Removes the packed pages of a row where `gone` [pages] says so. The other pages' records are not touched."""
        count = len(self.row_pages(row))
        if gone.shape != (count,) or gone.dtype != np.bool_:
            raise ValueError(f"[cache.evict] expected bool [{count}]; got {gone.dtype} {list(gone.shape)}")
        self.pool.free(self.rows.remove(row, gone))

    def insert(self, row: int, ids: Ids, starts: I64) -> None:
        """Gives a row pages of the pool, whose references it takes over, at the places that their positions give."""
        self.rows.insert(row, ids, starts)

    def select(self, rows: Iterable[int]) -> None:
        """Makes row i what row `rows[i]` was: reorders, repeats and removes rows (beam search, a batch row that
        leaves). Pages are shared, not copied.

        Raises:
            ValueError: a row that is not there.
        """
        self.become(self.fork(rows))

    def become(self, other: LayerCache) -> None:
        """Takes the contents of a fork, which is of no use then."""
        mine = self.rows, self.buffer, self.eviction
        self.rows, self.buffer, self.eviction = other.rows, other.buffer, other.eviction
        other.rows, other.buffer, other.eviction = mine
        self.undo = None
        other.release()

    def fork(self, rows: Iterable[int] | None = None) -> LayerCache:
        """A cache of the given rows (default: all) that shares this one's pages; either may change without the
        other.

        Raises:
            ValueError: a row that is not there.
        """
        return fork_rows(self, rows)

    def check_join(self, other: LayerCache) -> None:
        """Raises what `join` would raise."""
        check_join(self, other)

    def join(self, other: LayerCache) -> None:
        """Adds the rows of another cache behind this one's. Pages of the same pool are shared, others copied.

        Raises:
            ValueError: another codec, dtype or device; other strategies; a full pool. Nothing has changed.
        """
        join_rows(self, other)

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
        none = np.zeros((self.batch, 0), np.int64)
        pages = (ids[np.maximum(table, 0)], starts.copy()) if len(ids) else (none, none)
        exact, packed, seen = lengths
        rows = RowTable(self.arrays, self.pool, exact.copy(), packed.copy(), seen.copy(), *pages)
        self.buffer.fill(k, v)
        self.pool.share(rows.pages())
        self.rows = rows

    def __copy__(self) -> LayerCache:
        return self.fork()

    def __deepcopy__(self, memo: object) -> LayerCache:
        return self.fork()

    def __reduce__(self) -> NoReturn:
        raise TypeError("[cache] expected forgeattention.cache.save; got pickle, which cannot follow page addresses")

    def release(self) -> None:
        """Gives up all pages; the cache is of no use then."""
        rows, eviction = self.__dict__.get("rows"), self.__dict__.get("eviction")
        if rows is None:
            return
        pages, self.rows, self.eviction, self.undo = rows.pages(), None, None, None  # type: ignore[assignment]
        self.pool.free(pages)
        if eviction is not None:
            eviction.release()

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.release()
