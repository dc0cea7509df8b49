"""New tokens as they come: one, a few (a draft that is checked), or a chunk of a prompt.

A few tokens give what single ones would: they are appended and attended to together up to the token for which a page
leaves, and go on from there. A chunk attends to itself exactly, however many of its tokens are packed afterwards. What
a row's tokens give depends on how that row's tokens were cut into pieces, not on other rows or on padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .append import STEP_TOKENS, Keep, check_append, check_step
from .chunk import attend_chunk
from .edit import trim_rows
from .rows import I64

if TYPE_CHECKING:
    from .layer import LayerCache


@dataclass(frozen=True)
class Undo:
    """How to go back behind the pages that left during a step of several tokens.

    Attributes:
        before: the cache as it was before that step.
        k, v: the step's tokens, [batch, kv_heads, n, head_dim].
        held: how many of them each row still holds, [batch]; negative once older ones were trimmed too.
        seen, packed: the lengths of the cache that this belongs to. They are other arrays once it has changed.
    """

    before: LayerCache
    k: Any
    v: Any
    held: I64
    seen: I64
    packed: I64

    @property
    def leaving(self) -> I64:
        """Index of each row's first token for which a page leaves, [batch]."""
        return _leaving(self.before)


def _leaving(cache: LayerCache) -> I64:
    """Index of each row's first new token for which a page leaves, [batch]."""
    return cache.buffer.capacity - 1 - cache.rows.exact


def until_packed(cache: LayerCache, n: int) -> int:
    """How many of n new tokens come before one, not the first, for which a page leaves some row."""
    leaving = _leaving(cache)
    return int(leaving[(leaving > 0) & (leaving < n)].min(initial=n))


def _few(cache: LayerCache, n: int) -> bool:
    return n <= min(STEP_TOKENS, cache.codec.spec.window) and bool(cache.rows.seen.all())


def is_step(cache: LayerCache, n: int, keep: Keep | None = None) -> bool:
    """What `LayerCache.is_step` does."""
    return keep is None and (n == 1 or (_few(cache, n) and until_packed(cache, n) == n))


def step(cache: LayerCache, q: Any, k: Any, v: Any, scale: float, keep: Keep | None, sink_logits: Any | None) -> Any:
    """What `LayerCache.step` does."""
    confirm = check_append(cache, k, v, keep)
    check_step(cache, q, k)
    rows, n = cache.rows, k.shape[2]
    few = keep is None and (n == 1 or _few(cache, n))
    if few and n > 1 and until_packed(cache, n) < n:
        confirm()
        return _in_parts(cache, q, k, v, scale, sink_logits)
    if cache.eviction is not None:
        cache.eviction.prepare(cache, q, scale, n, keep)
    if few:
        if cache.eviction is None and rows.most_exact + n < cache.buffer.k.shape[2]:
            confirm()
            cache.undo = None
            cache.buffer.write(rows, k, v)
            rows.grow(n)
        else:
            cache.append(k, v, None, confirm)
        return cache.attend(q, scale, causal=q.shape[2] > 1, sink_logits=sink_logits)[0]
    # The device attends to the past while what was asked of the new values comes back.
    out = attend(cache, q, k, v, scale, keep, sink_logits)
    cache.append(k, v, keep, confirm)
    return out


def _in_parts(cache: LayerCache, q: Any, k: Any, v: Any, scale: float, sink_logits: Any | None) -> Any:
    """A step of a few tokens during which pages leave."""
    n, first = k.shape[2], k.shape[2] - q.shape[2]
    before, found, start = cache.fork(), [], 0
    try:
        while start < n:
            stop = start + until_packed(cache, n - start)
            queries = q[:, :, max(start - first, 0) : max(stop - first, 0)]
            new = k[:, :, start:stop], v[:, :, start:stop]
            if queries.shape[2]:
                found.append(step(cache, queries, *new, scale, None, sink_logits))
            else:
                cache.append(*new)
            start = stop
    except BaseException:
        cache.become(before)
        raise
    if cache.eviction is None and cache.sharding is None:
        held = np.full(cache.batch, n)
        cache.undo = Undo(before, k, v, held, cache.rows.seen, cache.rows.packed)
    return found[0] if len(found) == 1 else cache.arrays.concat(found, 2)


def attend(cache: LayerCache, q: Any, k: Any, v: Any, scale: float, keep: Keep | None, sink_logits: Any | None) -> Any:
    """What `LayerCache.attend_chunk` does."""
    if keep is None:
        if _few(cache, k.shape[2]):
            return cache.fork().step(q, k, v, scale, sink_logits=sink_logits)
        return attend_chunk(cache, q, k, v, keep, scale, sink_logits)
    out = attend_chunk(cache, q, k, v, keep, scale, sink_logits)
    if cache.sharding is not None:
        return out
    # A few tokens in a padded piece are what they are without the padding.
    count, first = keep.sum(1), k.shape[2] - q.shape[2]
    few = (count <= max(1, min(STEP_TOKENS, cache.codec.spec.window))) & (cache.rows.seen > 0)
    for row in np.flatnonzero(few & (_leaving(cache) < count)).tolist():
        real = np.flatnonzero(keep[row])
        asked = real[real >= first] - first
        if len(asked):
            one, at, asked = slice(row, row + 1), cache.arrays.index(real), cache.arrays.index(asked)
            alone = cache.fork([row])
            new = k[one][:, :, at], v[one][:, :, at]
            out[one, :, asked] = alone.step(q[one][:, :, asked], *new, scale, sink_logits=sink_logits)
    return out


def trim(cache: LayerCache, n: Any) -> None:
    """What `LayerCache.trim` does."""
    undo, rows = cache.undo, cache.rows
    if undo is None or undo.seen is not rows.seen or undo.packed is not rows.packed:
        trim_rows(cache, n)
        return
    drop = np.broadcast_to(np.asarray(n, np.int64), rows.seen.shape)
    held = undo.held - drop
    back = (undo.leaving >= held) & (undo.leaving < undo.held)
    if back.any() and (drop >= 0).all() and (drop <= rows.seen).all():
        cache.become(_restored(cache, undo, drop, back))
    else:
        trim_rows(cache, n)
    cache.undo = replace(undo, held=held, seen=cache.rows.seen, packed=cache.rows.packed)


def _restored(cache: LayerCache, undo: Undo, drop: I64, back: Keep) -> LayerCache:
    """The cache without the newest `drop` [batch] tokens, where a page comes back to rows `back` [batch]."""
    some, rest = np.flatnonzero(back), np.flatnonzero(~back)
    held = (undo.held - drop)[some]
    out = undo.before.fork(some)
    k, v = (cache.arrays.take(x, some) for x in (undo.k, undo.v))
    out.append(k, v, np.arange(undo.k.shape[2]) < held[:, None])
    out.trim(np.maximum(-held, 0))
    if len(rest):
        others = cache.fork(rest)
        others.trim(drop[rest])
        others.join(out)
        out = others.fork(np.argsort(np.append(rest, some)))
    return out
