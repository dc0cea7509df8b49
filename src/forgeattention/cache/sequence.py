"""The cache of one layer: exact sinks, packed pages, exact recent tokens, for a batch of rows of any length."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..codec import PAGE, Codec
from ..ops.arrays import FLOATS, dtype_of
from ..ops.table import ExactTokens, PageTable
from ..sparse import SparseLayer, SparseStep
from .arrays import Arrays, arrays_of
from .pages import Ids, PagePool

I64 = NDArray[np.int64]


@dataclass
class _Append:
    """What an append will do to one row: `pages` new pages, then `tail` follows the first `keep` exact tokens."""

    row: int
    k: Any
    v: Any
    count: int
    pages: Ids = field(default_factory=lambda: np.zeros(0, np.int64))


class LayerCache:
    """Keys and values of one layer for a batch of rows.

    A row is [sinks | packed pages | recent tokens]. The first `spec.sinks` tokens and the newest `spec.window` to
    `spec.window` + 63 are exact; when `spec.window` + 64 recent tokens would be held, the oldest leave in pages of
    64. What a row holds depends only on what was appended to, trimmed and evicted from it. Each page knows its
    position, so that pages may be missing. A call that raises leaves the cache as it was.

    The lengths and the page table lie on the device and are mirrored on the host; appending and attending one token
    waits for no device.

    Attributes:
        sparse: which tokens `attend` reads; None for all.
        sparse_step: what its last call left out; None for nothing.

    Args:
        codec: the layer's codec.
        batch: rows, all empty.
        arrays: framework and device; see `arrays_of`.
        dtype: of the exact tokens: "float32", "float16" or "bfloat16".
        pool: pages shared with other caches of the same codec, or None for an own pool.
        max_pages: most pages of an own pool.
        backend: which kernels encode and attend, "auto" or a name of `ops`.
    """

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

    @classmethod
    def like(cls, k: Any, codec: Codec, **options: Any) -> LayerCache:
        """An empty cache for keys such as `k` [batch, kv_heads, tokens, head_dim]; `options` as for the constructor."""
        arrays = arrays_of(k)
        return cls(codec, k.shape[0], arrays, dtype_of(k), **options)

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

    def prepare(self, q: Any, scale: float, n: int, keep: NDArray[np.bool_] | None = None) -> None:
        """Told, before `append`, of the queries q [batch, q_heads, m, head_dim] of the last m of n tokens to come (real
        where `keep` [batch, n] says so). Nothing here; a cache that evicts may recall pages."""

    def append(self, k: Any, v: Any, keep: NDArray[np.bool_] | None = None) -> None:
        """Adds tokens to every row.

        A long append is encoded from `k` and `v` where they lie; no copy of them is kept.

        Args:
            k, v: [batch, kv_heads, n, head_dim] in the cache's dtype, on its device, the last axis contiguous.
            keep: bool [batch, n] on the host: which tokens are real; None for all.

        Raises:
            ValueError: a wrong shape, dtype or device; NaN or infinity (off the CPU this is looked for where more
                than 8 tokens are appended, and else left to the encoder); a full pool.
        """
        n = self.check(k, v, keep)
        if keep is None and self._exact_max + n < self._flush_at:
            self._write(k, v, n)
        else:
            self._append_rows(k, v, keep)

    def attend(self, q: Any, scale: float, *, causal: bool = True, sink_logits: Any = None) -> tuple[Any, Any]:
        """`ops.decode_attention` of q [batch, q_heads, n, head_dim] over the whole cache; with `sparse` over what
        matters of the rows that are long enough for it."""
        table, self.sparse_step = self.table, None
        if self.sparse is None or table is None:
            return self._attend(q, scale, causal, sink_logits)
        dense = self._packed < max(self.sparse.spec.min_context, 1)
        if dense.all():
            return self._attend(q, scale, causal, sink_logits)
        out, lse, self.sparse_step = self.sparse.attend(
            q, self.codec, table, self._exact_tokens, scale, causal, sink_logits, self.backend
        )
        if dense.any():  # a row's result is the same in any batch
            rows = self.arrays.index(np.flatnonzero(dense))
            whole, whole_lse = self._attend(q, scale, causal, sink_logits)
            out[rows], lse[rows] = whole[rows], whole_lse[rows]
        return out, lse

    def _attend(self, q: Any, scale: float, causal: bool, sink_logits: Any) -> tuple[Any, Any]:
        return ops.decode_attention(
            q,
            self.codec,
            self.table,
            self._exact_tokens,
            scale,
            causal=causal,
            sink_logits=sink_logits,
            backend=self.backend,
        )

    @property
    def capacity(self) -> int:
        """Exact tokens at which a row's oldest recent ones leave in pages."""
        return self._flush_at

    def reserve(self, tokens: int) -> None:
        """Widens the page table to `tokens` packed tokens a row, so that it stays where it is until then."""
        pages = -(-tokens // PAGE)
        if pages > self._ids.shape[1]:
            self._widen(pages)
            self._set_lengths(self._exact, self._packed, self._seen)

    def make_room(self, n: int) -> None:
        """Packs what would leave the rows if `n` more tokens came.

        Raises:
            ValueError: a full pool.
        """
        self._append_rows(self._k[:, :, :0], self._v[:, :, :0], None, n)

    def advance(self, n: int) -> None:
        """Takes note of n tokens that were written behind every row's exact ones by other means; with 0, only sets the
        device's lengths to the host's."""
        if n:
            self._exact += n
            self._seen += n
            self._exact_max += n
            self._exact_tokens = ExactTokens(self._k, self._v, self._exact_device, self._exact_max)
        else:
            self._set_lengths(self._exact, self._packed, self._seen)

    def attend_packed(self, q: Any, table: PageTable | None, scale: float) -> tuple[Any, Any] | None:
        """`ops.prefill_attention` of q over `table`, this cache's or one row's packed tokens; None without any."""
        return None if table is None else ops.prefill_attention(q, self.codec, table, scale, backend=self.backend)

    def trim(self, n: int | Sequence[int] | I64) -> None:
        """Removes the newest `n` tokens of each row (one number, or one per row), evicted ones counted.

        Where the cut falls inside a page, the page's remaining tokens return from their codes as exact ones. They keep
        the error that the codes had, and when they are packed again it adds a second one.

        Raises:
            ValueError: a negative number, or more tokens than a row has.
        """
        lengths = self._seen
        drop = np.broadcast_to(np.asarray(n, np.int64), lengths.shape)
        if (drop < 0).any() or (drop > lengths).any():
            raise ValueError(f"[cache.trim] expected 0 <= n <= tokens {lengths.tolist()}; got {drop.tolist()}")
        if not drop.any():
            return
        sinks, seen = self.codec.spec.sinks, lengths - drop
        counts = self._packed // PAGE
        left = np.arange(self._starts.shape[1]) < counts[:, None]
        whole = (left & (self._starts + PAGE <= seen[:, None])).sum(1)
        cut = np.flatnonzero((left & (self._starts < seen[:, None])).sum(1) > whole)
        if len(cut):
            decoded = self._decode(self._ids[cut, whole[cut]])
        # Recent tokens are the newest positions without a gap.
        recent = np.maximum(np.maximum(self._exact - sinks, 0) - drop, 0)
        recent[cut] = seen[cut] - self._starts[cut, whole[cut]]
        for i, row in enumerate(cut.tolist()):
            count = int(recent[row])
            for buffer, tokens in zip((self._k, self._v), decoded):
                buffer[row, :, sinks : sinks + count] = tokens[i, :, :count]
        for row in np.flatnonzero(whole < counts).tolist():
            self.pool.free(self._ids[row, whole[row] : counts[row]])
        self._set_lengths(np.minimum(seen, sinks) + recent, whole * PAGE, seen)

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

    def empty(self, rows: int, pool: PagePool) -> LayerCache:
        """A cache like this one with empty rows and the given pool."""
        return LayerCache(self.codec, rows, self.arrays, self.dtype, pool=pool, backend=self.backend)

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

    def clear(self) -> None:
        """Removes all tokens; the rows stay."""
        self.trim(self._seen)

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

    def check(self, k: Any, v: Any, keep: NDArray[np.bool_] | None = None) -> int:
        """Raises what `append` would raise for these arguments but for a full pool; gives n."""
        want = (self.batch, self.codec.kv_heads, k.shape[2] if len(k.shape) == 4 else 0, self.codec.head_dim)
        for name, x in (("k", k), ("v", v)):
            if tuple(x.shape) != want:
                shape = f"[{want[0]}, {want[1]}, n, {want[3]}]"
                raise ValueError(f"[cache.append] expected {name} {shape}; got {list(x.shape)}")
            if not self.arrays.owns(x) or dtype_of(x) != self.dtype:
                raise ValueError(f"[cache.append] expected {name} in {self.dtype} on the cache's device; got {x.dtype}")
        n = want[2]
        if keep is not None and (keep.shape != (self.batch, n) or keep.dtype != np.bool_):
            got = f"{keep.dtype} {list(keep.shape)}"
            raise ValueError(f"[cache.append] expected keep bool [{self.batch}, {n}]; got {got}")
        if self.arrays.on_host or n > 8:
            for name, x in (("k", k), ("v", v)):
                if not self.arrays.finite(x):
                    raise ValueError(f"[cache.append] expected finite {name}; got NaN or infinity")
        return n

    def _write(self, k: Any, v: Any, n: int) -> None:
        """Appends to the exact tokens of every row, which have room."""
        if self._uniform:
            end = self._exact_max
            self._k[:, :, end : end + n] = k
            self._v[:, :, end : end + n] = v
        else:
            at = self._exact_device[:, None] + self._steps[:n]
            self._k[self._rows, :, at] = k.swapaxes(1, 2)
            self._v[self._rows, :, at] = v.swapaxes(1, 2)
        self._exact += n
        self._seen += n
        self._exact_max += n
        self._exact_device += n
        self._exact_tokens = ExactTokens(self._k, self._v, self._exact_device, self._exact_max)

    def _append_rows(self, k: Any, v: Any, keep: NDArray[np.bool_] | None, room: int = 0) -> None:
        plans = []
        for row in range(self.batch):
            picked: Any = slice(None)
            if keep is not None:
                real = np.flatnonzero(keep[row])
                contiguous = len(real) == 0 or real[-1] - real[0] + 1 == len(real)
                start = int(real[0]) if len(real) else 0
                picked = slice(start, start + len(real)) if contiguous else self.arrays.index(real)
            row_k, row_v = k[row][:, picked], v[row][:, picked]
            plans.append(_Append(row, row_k, row_v, row_k.shape[1]))
        wanted = [max(0, (int(self._exact[p.row]) + p.count + room - self._flush_at) // PAGE + 1) for p in plans]
        ids = self.pool.alloc(sum(wanted))
        try:
            for plan, count in zip(plans, wanted):
                plan.pages, ids = ids[:count], ids[count:]
                self._encode(plan)
        except BaseException:
            self.pool.free(np.concatenate([p.pages for p in plans] + [ids]))
            raise
        self._commit(plans)

    def _encode(self, plan: _Append) -> None:
        """Encodes what leaves a row: its oldest recent tokens, joined with the first new ones, then new ones alone."""
        pages, sinks, held = len(plan.pages), self.codec.spec.sinks, int(self._exact[plan.row])
        if not pages:
            return
        addresses = self.pool.addresses(plan.pages)
        mixed = min(pages, -(-max(held - sinks, 0) // PAGE))
        if mixed:
            end = sinks + mixed * PAGE
            k, v = (
                self.arrays.concat([buffer[plan.row, :, sinks : min(held, end)], new[:, : max(end - held, 0)]], 1)
                for buffer, new in ((self._k, plan.k), (self._v, plan.v))
            )
            at = self.arrays.index(addresses[:mixed])
            ops.encode(k, v, self.codec, self.pool.base, at, backend=self.backend)
        if pages > mixed:
            new = slice(sinks + mixed * PAGE - held, sinks + pages * PAGE - held)
            at = self.arrays.index(addresses[mixed:])
            ops.encode(plan.k[:, new], plan.v[:, new], self.codec, self.pool.base, at, backend=self.backend)

    def _commit(self, plans: list[_Append]) -> None:
        sinks, (exact, packed, seen) = self.codec.spec.sinks, (x.copy() for x in self._host_lengths)
        most = max((int(packed[p.row]) // PAGE + len(p.pages) for p in plans), default=0)
        if most > self._ids.shape[1]:
            self._widen(max(most, self._ids.shape[1] * 5 // 4))
        for p in plans:
            held, gone = int(exact[p.row]), PAGE * len(p.pages)
            for buffer, new in ((self._k, p.k), (self._v, p.v)):
                if not gone:
                    buffer[p.row, :, held : held + p.count] = new
                    continue
                if held < sinks:
                    buffer[p.row, :, held:sinks] = new[:, : sinks - held]
                left = max(held - sinks - gone, 0)
                if left:
                    buffer[p.row, :, sinks : sinks + left] = self.arrays.copy(buffer[p.row, :, sinks + gone : held])
                total = held + p.count - gone
                buffer[p.row, :, sinks + left : total] = new[:, p.count - (total - sinks - left) :]
            if gone:
                first = int(packed[p.row]) // PAGE
                at = p.row, slice(first, first + len(p.pages))
                self._ids[at] = p.pages
                oldest = max(int(seen[p.row]) - max(held - sinks, 0), sinks)
                self._starts[at] = oldest + PAGE * np.arange(len(p.pages))
                self.arrays.assign(self._offsets, self.pool.addresses(p.pages), at)
            exact[p.row] += p.count - gone
            packed[p.row] += gone
            seen[p.row] += p.count
        self._set_lengths(exact, packed, seen)

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

    def _decode(self, pages: Ids) -> tuple[Any, Any]:
        """Keys and values [pages, kv_heads, 64, head_dim] of single pages."""
        offsets = self.arrays.zeros((len(pages), 1), "int64")
        self.arrays.assign(offsets, self.pool.addresses(pages)[:, None])
        lengths = self.arrays.zeros((len(pages),), "int32") + PAGE
        return ops.decode_pages(self.codec, PageTable(self.pool.base, offsets, lengths, PAGE), backend=self.backend)

    def _row_index(self, rows: Iterable[int]) -> I64:
        index = np.fromiter(rows, np.int64)
        if (index < 0).any() or (index >= self.batch).any():
            raise ValueError(f"[cache.select] expected rows in [0, {self.batch}); got {index.tolist()}")
        return index


def _widen(ids: Ids, width: int) -> Ids:
    return np.pad(ids, ((0, 0), (0, width - ids.shape[1])))
