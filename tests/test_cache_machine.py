"""Random histories of a cache against plain lists of tokens."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_model import Row, assert_agrees
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forgeattention import CodecSpec
from forgeattention.cache import LayerCache, PagePool, TorchArrays, load, save
from forgeattention.codec import Codec

CODEC = Codec(CodecSpec(k_bits=2, v_bits=2, sinks=2, window=9), 64, 1)
MAX_ROWS = 4


class CacheMachine(RuleBasedStateMachine):
    """Up to three caches, some with a common pool, each beside its rows as plain lists."""

    @initialize(batch=st.integers(1, 3))
    def start(self, batch: int) -> None:
        self.pools = [PagePool(CODEC.page_bytes, TorchArrays(), max_pages=60)]
        cache = LayerCache(CODEC, batch, TorchArrays(), pool=self.pools[0], backend="reference")
        self.caches: list[tuple[LayerCache, list[Row]]] = [(cache, [Row(CODEC) for _ in range(batch)])]
        self.random = np.random.default_rng(batch)

    def pick(self, which: int) -> tuple[LayerCache, list[Row]]:
        return self.caches[which % len(self.caches)]

    @rule(which=st.integers(0, 2), n=st.one_of(st.integers(0, 3), st.integers(4, 170)), ragged=st.booleans())
    def append(self, which: int, n: int, ragged: bool) -> None:
        cache, rows = self.pick(which)
        k, v = (torch.from_numpy(self.random.standard_normal((len(rows), 1, n, 64), np.float32)) for _ in range(2))
        keep = self.random.random((len(rows), n)) < 0.7 if ragged else None
        wanted = [row.copy() for row in rows]
        for i, row in enumerate(wanted):
            real = range(n) if keep is None else np.flatnonzero(keep[i])
            row.append([(k[i, :, t].numpy(), v[i, :, t].numpy()) for t in real])
        new = sum(len(b.packed) - len(a.packed) for a, b in zip(rows, wanted)) // 64
        if cache.pool.in_use + new > 60:
            with pytest.raises(ValueError, match="expected at most 60 pages"):
                cache.append(k, v, keep)
        else:
            cache.append(k, v, keep)
            rows[:] = wanted

    @rule(which=st.integers(0, 2), share=st.lists(st.floats(0, 1), min_size=MAX_ROWS, max_size=MAX_ROWS))
    def trim(self, which: int, share: list[float]) -> None:
        cache, rows = self.pick(which)
        drops = [int(s * len(row)) for s, row in zip(share, rows)]
        cache.trim(drops)
        for row, n in zip(rows, drops):
            row.trim(n)

    @rule(which=st.integers(0, 2), picks=st.lists(st.integers(0, 99), min_size=1, max_size=MAX_ROWS))
    def reorder(self, which: int, picks: list[int]) -> None:
        cache, rows = self.pick(which)
        if rows:
            index = [p % len(rows) for p in picks]
            cache.select(index)
            rows[:] = [rows[i].copy() for i in index]

    @precondition(lambda self: len(self.caches) < 3)
    @rule(which=st.integers(0, 2))
    def fork(self, which: int) -> None:
        cache, rows = self.pick(which)
        self.caches.append((cache.fork(), [row.copy() for row in rows]))

    @precondition(lambda self: len(self.caches) > 1)
    @rule(which=st.integers(0, 2))
    def drop(self, which: int) -> None:
        self.caches.pop(which % len(self.caches))

    @precondition(lambda self: len(self.caches) > 1)
    @rule(a=st.integers(0, 2), b=st.integers(0, 2))
    def join(self, a: int, b: int) -> None:
        (cache, rows), (other, more) = self.pick(a), self.pick(b)
        if len(rows) + len(more) <= MAX_ROWS and cache.pool.in_use + sum(len(r.packed) for r in more) // 64 <= 60:
            more = [row.copy() for row in more]
            cache.join(other)
            rows += more

    @rule(which=st.integers(0, 2))
    def save_and_load(self, which: int) -> None:
        cache, rows = self.pick(which)
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder) / "cache", {0: cache}, "m")
            loaded, _ = load(Path(folder) / "cache", {0: CODEC}, "m", TorchArrays(), max_pages=60, backend="reference")
        self.pools.append(loaded[0].pool)
        self.caches[which % len(self.caches)] = loaded[0], rows

    @rule(which=st.integers(0, 2), n=st.integers(1, 100))
    def bad_append(self, which: int, n: int) -> None:
        cache, rows = self.pick(which)
        if rows:
            k = torch.zeros(len(rows), 1, n, 64)
            bad = k.clone()
            bad[-1, 0, n // 2, 5] = torch.nan
            with pytest.raises(ValueError, match="expected finite"):
                cache.append(k, bad)

    @invariant()
    def agrees(self) -> None:
        used: dict[int, set[int]] = {}
        for cache, rows in getattr(self, "caches", []):
            assert_agrees(cache, rows)
            pages = [page for row in range(cache.batch) for page in cache.row_pages(row).tolist()]
            used.setdefault(id(cache.pool), set()).update(pages)
        for pool in getattr(self, "pools", []):
            assert pool.in_use == len(used.get(id(pool), ()))
            assert pool.nbytes >= pool.in_use * pool.page_bytes
            assert (pool.nbytes == 0) == (pool.in_use == 0)

    def teardown(self) -> None:
        self.caches = []
        for pool in getattr(self, "pools", []):
            assert (pool.in_use, pool.nbytes) == (0, 0)


CacheMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCache: Any = CacheMachine.TestCase
