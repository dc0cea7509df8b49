"""Appending to a cache: what is checked, what is packed, how it takes effect."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..codec import PAGE
from ..ops.checks import check_queries
from .pool import Ids

if TYPE_CHECKING:
    from .layer import LayerCache

STEP_TOKENS = 8
"""At most so many new tokens are one call of `ops.decode_attention` (fewer where `spec.window` is smaller); more are a
chunk."""

Keep = NDArray[np.bool_]


@dataclass
class _Append:
    """What an append does to one row: its new tokens k, v [kv_heads, count, head_dim], the `full` pages that fill up,
    and which of those this process keeps, bool [full], as `ids` of the pool."""

    row: int
    k: Any
    v: Any
    full: int = 0
    kept: Keep = field(default_factory=lambda: np.zeros(0, np.bool_))
    ids: Ids = field(default_factory=lambda: np.zeros(0, np.int64))


def check_step(cache: LayerCache, q: Any, k: Any) -> None:
    """Raises ValueError for queries that are not those of the last of the new tokens k."""
    shape, (batch, heads, _, dim) = q.shape, cache.buffer.k.shape
    if len(shape) != 4 or shape[0] != batch or shape[3] != dim or shape[1] % heads or not 0 < shape[2] <= k.shape[2]:
        check_queries("cache.step", q, cache.codec)
        raise ValueError(f"[cache.step] expected q [{batch}, q_heads, m, {dim}] of new tokens; got {list(shape)}")


def check_append(cache: LayerCache, k: Any, v: Any, keep: Keep | None) -> Callable[[], int]:
    """What `LayerCache.check` does."""
    buffer = cache.buffer.k
    batch, heads, _, dim = buffer.shape
    n = k.shape[2] if len(k.shape) == 4 else 0
    want = (batch, heads, n, dim)
    owns = cache.arrays.owns
    for name, x in (("k", k), ("v", v)):
        if x.shape != want and tuple(x.shape) != want:
            shape = f"[{batch}, {heads}, n, {dim}]"
            raise ValueError(f"[cache.append] expected {name} {shape}; got {list(x.shape)}")
        if not owns(x) or x.dtype != buffer.dtype:
            raise ValueError(f"[cache.append] expected {name} in {cache.dtype} on the cache's device; got {x.dtype}")
    if keep is not None and (keep.shape != (batch, n) or keep.dtype != np.bool_):
        got = f"{keep.dtype} {list(keep.shape)}"
        raise ValueError(f"[cache.append] expected keep bool [{batch}, {n}]; got {got}")
    if n <= STEP_TOKENS and (not cache.arrays.on_host or math.isfinite(float(k.sum()) + float(v.sum()))):
        return partial(int, n)
    finite = cache.arrays.finite((k, v))

    def confirm() -> int:
        for name, good in zip("kv", finite()):
            if not good:
                raise ValueError(f"[cache.append] expected finite {name}; got NaN or infinity")
        return n

    return confirm


def append(cache: LayerCache, k: Any, v: Any, keep: Keep | None, n: int) -> None:
    """Appends n checked tokens to every row."""
    rows = cache.rows
    if keep is None and rows.most_exact + n < cache.buffer.k.shape[2]:
        cache.buffer.write(rows, k, v)
        rows.grow(n)
    else:
        append_rows(cache, k, v, keep)


def append_rows(cache: LayerCache, k: Any, v: Any, keep: Keep | None, room: int = 0) -> None:
    """Appends row by row, with pages as they fill; `room` more tokens must fit into each row afterwards."""
    plans, exact, capacity = [], cache.rows.exact, cache.buffer.capacity
    for row in range(cache.batch):
        picked: Any = slice(None)
        if keep is not None:
            real = np.flatnonzero(keep[row])
            contiguous = len(real) == 0 or real[-1] - real[0] + 1 == len(real)
            start = int(real[0]) if len(real) else 0
            picked = slice(start, start + len(real)) if contiguous else cache.arrays.index(real)
        plan = _Append(row, k[row][:, picked], v[row][:, picked])
        plan.full = max(0, (int(exact[row]) + plan.k.shape[1] + room - capacity) // PAGE + 1)
        first = cache.rows.pages_seen(row)
        plan.kept = np.ones(plan.full, np.bool_) if cache.sharding is None else cache.sharding.keeps(first, plan.full)
        plans.append(plan)
    fresh = cache.pool.alloc(sum(int(p.kept.sum()) for p in plans))
    before = cache.rows.seen
    try:
        at = 0
        for plan in plans:
            count = int(plan.kept.sum())
            plan.ids, at = fresh[at : at + count], at + count
            _encode(cache, plan)
        _commit(cache, plans)
    except BaseException:
        if cache.rows.seen is before:
            cache.pool.free(fresh)
        raise


def _encode(cache: LayerCache, plan: _Append) -> None:
    """Encodes what leaves a row: its oldest recent tokens, joined with the first new ones, then new ones alone."""
    full, sinks, held = plan.full, cache.codec.spec.sinks, int(cache.rows.exact[plan.row])
    if not len(plan.ids):
        return
    offsets = np.zeros(full, np.int64)
    offsets[plan.kept] = cache.pool.addresses(plan.ids)
    mixed = min(full, -(-max(held - sinks, 0) // PAGE))
    parts = []
    if mixed:
        parts.append((0, mixed, cache.buffer.recent(plan.row, sinks, held, mixed * PAGE, plan.k, plan.v)))
    if full > mixed:
        new = slice(sinks + mixed * PAGE - held, sinks + full * PAGE - held)
        parts.append((mixed, full, (plan.k[:, new], plan.v[:, new])))
    for first, last, (k, v) in parts:
        mine, at = plan.kept[first:last], cache.arrays.index(offsets[first:last][plan.kept[first:last]])
        if not mine.any():
            continue
        if not mine.all():
            tokens = cache.arrays.index(np.flatnonzero(np.repeat(mine, PAGE)))
            k, v = k[:, tokens], v[:, tokens]
        ops.encode(k, v, cache.codec, cache.pool.base, at, backend=cache.backend)


def _commit(cache: LayerCache, plans: list[_Append]) -> None:
    rows, sinks = cache.rows, cache.codec.spec.sinks
    exact, packed, seen = rows.exact.copy(), rows.packed.copy(), rows.seen.copy()
    most = max((int(packed[p.row]) // PAGE + len(p.ids) for p in plans), default=0)
    if most > rows.ids.shape[1]:
        rows.reserve(max(most, rows.ids.shape[1] * 5 // 4))
    changed = [(p.row, slice(sinks, int(exact[p.row]))) for p in plans if p.full and exact[p.row] > sinks]
    with cache.buffer.restored(rows, changed):
        for p in plans:
            held, gone = int(exact[p.row]), PAGE * p.full
            if gone:
                oldest = max(int(seen[p.row]) - max(held - sinks, 0), sinks)
                starts = oldest + PAGE * np.flatnonzero(p.kept)
                rows.place(p.row, int(packed[p.row]) // PAGE, p.ids, starts)
            exact[p.row] = cache.buffer.replace(p.row, p.k, p.v, held, sinks, gone)
            packed[p.row] += PAGE * len(p.ids)
            seen[p.row] += p.k.shape[1]
        rows.set_lengths(exact, packed, seen)
