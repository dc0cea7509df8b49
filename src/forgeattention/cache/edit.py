"""Changes to a cache's rows: shortened, copied, joined."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import ops
from ..codec import PAGE
from ..ops.table import PageTable
from .pool import Ids
from .rows import I64

if TYPE_CHECKING:
    from .layer import LayerCache


def trim_rows(cache: LayerCache, n: int | Sequence[int] | I64) -> None:
    """What `LayerCache.trim` does where no page comes back."""
    rows, sinks = cache.rows, cache.codec.spec.sinks
    drop = np.broadcast_to(np.asarray(n, np.int64), rows.seen.shape)
    if (drop < 0).any() or (drop > rows.seen).any():
        raise ValueError(f"[cache.trim] expected 0 <= n <= tokens {rows.seen.tolist()}; got {drop.tolist()}")
    if not drop.any():
        return
    if cache.sharding is not None:
        cache.sharding.check_trim(int(drop[0]), max(int(rows.exact[0]) - sinks, 0), cache.rows.pages_seen(0))
    seen, counts = rows.seen - drop, rows.packed // PAGE
    used = np.arange(rows.starts.shape[1]) < counts[:, None]
    whole = (used & (rows.starts + PAGE <= seen[:, None])).sum(1)
    cut = np.flatnonzero((used & (rows.starts < seen[:, None])).sum(1) > whole)
    decoded = decode(cache, rows.ids[cut, whole[cut]]) if len(cut) else None
    # Recent tokens are the newest positions without a gap.
    recent = np.maximum(np.maximum(rows.exact - sinks, 0) - drop, 0)
    recent[cut] = seen[cut] - rows.starts[cut, whole[cut]]
    gone = rows.ids[used & (np.arange(used.shape[1]) >= whole[:, None])]
    regions = [(row, slice(sinks, sinks + int(recent[row]))) for row in cut.tolist()]
    before = rows.seen
    try:
        with cache.buffer.restored(rows, regions):
            for i, (row, part) in enumerate(regions):
                for buffer, tokens in zip((cache.buffer.k, cache.buffer.v), decoded or ()):
                    buffer[row, :, part] = tokens[i, :, : part.stop - sinks]
            rows.set_lengths(np.minimum(seen, sinks) + recent, whole * PAGE, seen)
    finally:
        if rows.seen is not before:
            cache.pool.free(gone)
    if cache.eviction is not None:
        cache.eviction.trimmed(cache)


def fork_rows(cache: LayerCache, rows: Iterable[int] | None) -> LayerCache:
    """What `LayerCache.fork` does."""
    index = np.fromiter(range(cache.batch) if rows is None else rows, np.int64)
    if (index < 0).any() or (index >= cache.batch).any():
        raise ValueError(f"[cache.select] expected rows in [0, {cache.batch}); got {index.tolist()}")
    if cache.sharding is not None:
        cache.sharding.check_rows(index, cache.batch)
    taken, buffer = cache.rows.take(index), cache.buffer.take(index)
    other = object.__new__(type(cache))
    other.__dict__.update({**cache.__dict__, "rows": None, "eviction": None, "undo": None})
    other.buffer = buffer
    eviction = None if cache.eviction is None else cache.eviction.take(index)
    cache.pool.share(taken.pages())
    other.rows, other.eviction = taken, eviction
    return other


def check_join(cache: LayerCache, other: LayerCache) -> None:
    """What `LayerCache.check_join` does."""
    codec, theirs = cache.codec.fingerprint, other.codec.fingerprint
    if codec != theirs or other.dtype != cache.dtype or not cache.arrays.owns(other.buffer.k):
        raise ValueError(
            f"[cache.join] expected codec {codec}, {cache.dtype} and this device; got {theirs}, {other.dtype}, "
            f"{type(other.buffer.k).__name__}"
        )
    if cache.sharding is not None or other.sharding is not None:
        raise ValueError("[context_parallel] expected a cache of one row that stays alone; got a join")
    if (cache.eviction is None) != (other.eviction is None):
        raise ValueError("[cache.join] expected a cache that evicts in the same way; got another")
    total = int((other.rows.packed // PAGE).sum())
    if other.pool is not cache.pool and cache.pool.max_pages is not None:
        room = cache.pool.max_pages - cache.pool.in_use
        if total > room:
            raise ValueError(f"[cache.join] expected at most {room} more pages; got {total}")


def join_rows(cache: LayerCache, other: LayerCache) -> None:
    """What `LayerCache.join` does."""
    check_join(cache, other)
    eviction = None if cache.eviction is None else cache.eviction.joined(other.eviction)
    new = np.zeros(0, np.int64)
    try:
        buffer = cache.buffer.joined(other.buffer, cache.dtype)
        theirs = other.rows.pages()
        if other.pool is cache.pool:
            cache.pool.share(theirs)
            new, ids = theirs, other.rows.ids
        else:
            new, ids = cache.pool.alloc(len(theirs)), np.zeros_like(other.rows.ids)
            for page, own in zip(theirs.tolist(), new.tolist()):
                cache.pool.write(own, other.pool.page(page))
            ids[np.arange(ids.shape[1]) < other.rows.packed[:, None] // PAGE] = new
        rows = cache.rows.joined(other.rows, ids)
    except BaseException:
        cache.pool.free(new)
        if eviction is not None:
            eviction.release()
        raise
    before, cache.rows, cache.buffer, cache.eviction = cache.eviction, rows, buffer, eviction
    if before is not None:
        before.release()


def decode(cache: LayerCache, pages: Ids) -> tuple[Any, Any]:
    """Keys and values, float32 [pages, kv_heads, 64, head_dim], of pages of a cache's pool."""
    arrays = cache.arrays
    offsets = arrays.zeros((len(pages), 1), "int64")
    arrays.assign(offsets, cache.pool.addresses(pages)[:, None])
    lengths = arrays.zeros((len(pages),), "int32") + PAGE
    table = PageTable(cache.pool.base, offsets, lengths, PAGE)
    return ops.decode_pages(cache.codec, table, backend=cache.backend)
