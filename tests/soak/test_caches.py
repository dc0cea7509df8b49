"""Random histories of caches with every strategy, on every backend that runs here, beside caches without one."""

from __future__ import annotations

import importlib.util
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from test_cache_machine import CacheMachine
from tolerances import CPU_ATTENTION

from forgeattention import CodecSpec, ops
from forgeattention.cache import Arrays, LayerCache, MLXArrays, NumpyArrays, TorchArrays, load, save
from forgeattention.cache.sharded import Sharding, merge_parts
from forgeattention.codec import Codec
from forgeattention.eviction import V1, Eviction, Evictor, Recency, Rope
from forgeattention.sparse import SparseLayer, SparseSpec

CODEC = Codec(CodecSpec(k_bits=2, v_bits=2, sinks=2, window=9, refine=False), 64, 1)
ROPE = Rope(10000.0 ** -(np.arange(32) / 32))
FRAMES: dict[str, tuple[Callable[[], Arrays], str]] = {
    "torch": (TorchArrays, "cpu"),
    "NumPy": (NumpyArrays, "cpu"),
    "oracle": (TorchArrays, "reference"),
}
if importlib.util.find_spec("mlx"):
    FRAMES["MLX"] = (MLXArrays, "auto")


class Part(Sharding):
    """One of `world` processes of which each attends in turn here."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.group = rank, world, None

    def attend(self, cache: LayerCache, q: Any, scale: float, causal: bool, sink_logits: Any) -> Any:
        first = self.rank == 0
        exact = cache.exact if first else None
        return ops.decode_attention(
            q, cache.codec, cache.table, exact, scale, causal=causal and first, backend=cache.backend
        )


class Twins(RuleBasedStateMachine):
    """A cache without a strategy, and beside it others that are told the same."""

    frame = "torch"
    counts: Counter[str]

    @initialize(batch=st.integers(1, 2), policy=st.sampled_from([Recency(0.5), V1(0.4)]))
    def start(self, batch: int, policy: Any) -> None:
        arrays, backend = FRAMES[self.frame]
        self.arrays, self.folder = arrays(), tempfile.TemporaryDirectory()
        self.random = np.random.default_rng(batch)

        def made(**options: Any) -> LayerCache:
            return LayerCache(CODEC, batch, self.arrays, backend=backend, **options)

        def evicting(where: str) -> Evictor:
            eviction = Eviction(policy, on_evict=where, interval=32, folder=self.folder.name, recall_share=0.1)
            return Evictor(eviction, ROPE)

        self.plain = made()
        self.all = made(sparse=SparseLayer(SparseSpec(top_k=10**6, min_context=0), None, None))
        self.most = made(sparse=SparseLayer(SparseSpec(top_p=0.9, min_context=0), None, None))
        self.evicting = [made(eviction=evicting(where)) for where in ("drop", "disk")]
        self.shards = [made(sharding=Part(rank, 3)) for rank in range(3)] if batch == 1 else []
        self.counts["histories"] += 1

    @property
    def every(self) -> list[LayerCache]:
        return [self.plain, self.all, self.most, *self.evicting, *self.shards]

    def array(self, *shape: int) -> Any:
        x = self.random.standard_normal(shape).astype(np.float32)
        if self.frame == "NumPy":
            return x
        if self.frame == "MLX":
            import mlx.core as mx

            return mx.array(x)
        return torch.from_numpy(x)

    @rule(n=st.one_of(st.integers(1, 3), st.integers(4, 170)))
    def append(self, n: int) -> None:
        k, v = self.array(self.plain.batch, 1, n, 64), self.array(self.plain.batch, 1, n, 64)
        q = self.array(self.plain.batch, 2, n, 64)
        for cache in self.every:
            cache.prepare(q, 0.125, n)
            cache.append(k, v)
        self.counts["appends"] += 1

    @rule(data=st.data())
    def trim_recent(self, data: Any) -> None:
        """So far as no page is cut, which caches that evict and shards cannot all do."""
        free = min(int(min(c.exact_lengths)) for c in self.every) - CODEC.spec.sinks
        n = data.draw(st.integers(0, max(0, free)))
        for cache in self.every:
            cache.trim(n)

    @rule()
    def clear(self) -> None:
        for cache in (self.plain, self.all, self.most, *self.evicting):
            cache.clear()
        self.shards = [cache.empty(1, cache.pool) for cache in self.shards]  # these cannot be cut into their pages

    @rule(swap=st.booleans())
    def fork(self, swap: bool) -> None:
        rows = None if not swap or self.plain.batch == 1 else [1, 0]
        self.plain, self.all, self.most = (c.fork(rows) for c in (self.plain, self.all, self.most))
        self.evicting = [c.fork(rows) for c in self.evicting]
        self.shards = [c.fork() for c in self.shards]
        self.counts["forks"] += 1

    @rule()
    def save_and_load(self) -> None:
        """What evicts comes back as a cache that keeps the rest; here only whether the same pages come back."""
        for cache in (self.plain, *self.evicting):
            path = Path(self.folder.name) / "cache"
            save(path, {0: cache}, "m")
            loaded, _ = load(path, {0: CODEC}, "m", self.arrays, backend=cache.backend)
            for row in range(cache.batch):
                assert self.records(loaded[0], row) == self.records(cache, row)
        self.counts["saves"] += 1

    def records(self, cache: LayerCache, row: int) -> dict[int, bytes]:
        host = cache.arrays.to_host
        pages = [np.asarray(host(cache.pool.page(page))).tobytes() for page in cache.row_pages(row).tolist()]
        return dict(zip(cache.page_starts(row).tolist(), pages, strict=True))

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "plain") or not int(min(self.plain.lengths)):
            return
        for cache in self.every:
            assert cache.lengths.tolist() == self.plain.lengths.tolist()
        for row in range(self.plain.batch):
            whole = self.records(self.plain, row)
            for cache in self.evicting:
                kept = self.records(cache, row)
                assert all(whole[start] == page for start, page in kept.items())
                waiting = cache.eviction.history.demoted[row]
                assert not {d.start for d in waiting} & set(kept)
                for d in waiting:
                    assert cache.eviction.store.get(d.number).tobytes() == whole[d.start]
            if self.shards:
                dealt = [self.records(cache, 0) for cache in self.shards]
                assert sum(map(len, dealt)) == len(whole)
                assert {start: page for part in dealt for start, page in part.items()} == whole
        q = self.array(self.plain.batch, 2, 1, 64)
        host = self.arrays.to_host
        out = np.asarray(host(self.plain.attend(q, 0.125)[0]))
        largest = np.abs(out).max()
        close = 3 * CPU_ATTENTION["float32"] * max(largest, 1)
        assert np.abs(np.asarray(host(self.all.attend(q, 0.125)[0])) - out).max() <= close
        values = 8.0  # no value of these normal tokens is larger, packed or not
        assert np.abs(np.asarray(host(self.most.attend(q, 0.125)[0])) - out).max() <= 2 * 0.1 * values + close
        if self.shards:
            joined = merge_parts([cache.attend(q, 0.125) for cache in self.shards])[0]
            assert np.abs(np.asarray(host(joined)) - out).max() <= close
        self.counts["comparisons"] += 1

    def teardown(self) -> None:
        if hasattr(self, "plain"):
            pools, stores = [c.pool for c in self.every], [c.eviction.store for c in self.evicting]
            self.plain = self.all = self.most = None
            self.evicting, self.shards = [], []
            assert all(pool.in_use == 0 for pool in pools)
            assert all(store is None or store.nbytes == 0 for store in stores)
            self.folder.cleanup()


def histories(number: Callable[[str], int]) -> settings:
    return settings(
        max_examples=max(3, number("cases") // 100),
        stateful_step_count=30,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("frame", FRAMES)
def test_strategies(frame: str, number: Callable[[str], int], counts: Counter[str]) -> None:
    machine = type("Machine", (Twins,), {"frame": frame, "counts": counts})
    run_state_machine_as_test(machine, settings=histories(number))


def test_rows_and_pools(number: Callable[[str], int], counts: Counter[str]) -> None:
    """`tests/test_cache_machine.py`, for longer."""

    class Counted(CacheMachine):
        @rule()
        def count(self) -> None:
            counts["marks"] += 1

    run_state_machine_as_test(Counted, settings=histories(number))
