"""A cache with an Evictor: survivors bit for bit, positions, demotion and recall, failures that change nothing."""

from __future__ import annotations

import copy
import os
from typing import Any

import numpy as np
import pytest
import torch

from forgeattention import CodecSpec, ops
from forgeattention.cache import LayerCache, PagePool, TorchArrays
from forgeattention.codec import PAGE, Codec
from forgeattention.eviction import V1, V3, Eviction, Evictor, Recency, Rope
from forgeattention.eviction.recall import mass_estimates, visitors
from forgeattention.eviction.state import Counts
from forgeattention.eviction.store import DiskStore, HostStore

CODEC = Codec(CodecSpec(window=64, refine=False), 64, 2)
ROPE = Rope(10000.0 ** -(np.arange(32) / 32))
SINKS = CODEC.spec.sinks


def tokens(n: int, batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, n, 64, generator=g), torch.randn(batch, 2, n, 64, generator=g)


def make(policy: Any = None, batch: int = 1, **options: Any) -> LayerCache:
    pool = options.pop("pool", None)
    setting = Eviction(policy or Recency(0.5), interval=64, **options)
    return LayerCache(CODEC, batch, TorchArrays(), eviction=Evictor(setting, ROPE), pool=pool)


def read(
    cache: LayerCache, n: int, block: int = 64, seed: int = 0, look: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Appends n tokens in blocks, each after a look by queries."""
    k, v = tokens(n, cache.batch, seed)
    q = torch.randn(cache.batch, 4, n, 64, generator=torch.Generator().manual_seed(seed + 1))
    for at in range(0, n, block):
        part = slice(at, at + block)
        if look:
            cache.prepare(q[:, :, part], 0.125, q[:, :, part].shape[2])
        cache.append(k[:, :, part], v[:, :, part])
    return k, v


def records(cache: LayerCache, row: int = 0) -> dict[int, bytes]:
    """The row's pages by position."""
    return {
        int(start): cache.pool.page(page).numpy().tobytes()
        for start, page in zip(cache.page_starts(row), cache.row_pages(row).tolist())
    }


def whole(n: int, seed: int = 0) -> dict[int, bytes]:
    cache = LayerCache(CODEC, 1, TorchArrays())
    read(cache, n, seed=seed)
    return records(cache)


@pytest.mark.parametrize("policy", [V1(0.4), V3(0.6, prefix=64, window=64), Recency(0.5)], ids=["v1", "v3", "recency"])
def test_survivors_are_the_same_bits_at_their_positions(policy):
    cache, plain = make(policy), whole(1000)
    read(cache, 1000)
    kept = records(cache)
    assert 0 < len(kept) < len(plain)
    assert all(plain[start] == record for start, record in kept.items())
    held = int(cache.packed_lengths[0] + cache.exact_lengths[0])
    assert cache.lengths.tolist() == [1000]
    assert cache.eviction.counts.evicted == len(plain) - len(kept)
    # what came since the last round is not yet counted against the budget
    assert held <= policy.share(1000) * 1000 + 2 * PAGE
    assert cache.pool.in_use == len(kept)


def test_attention_sees_survivors_and_no_one_else():
    cache = make(V1(0.4))
    k, _v = read(cache, 700)
    pages = np.concatenate([np.arange(s, s + PAGE) for s in cache.page_starts(0)])
    recent = np.arange(700 - (int(cache.exact_lengths[0]) - SINKS), 700)
    held = np.concatenate([np.arange(SINKS), recent])
    table, exact = cache.row(0)
    np.testing.assert_array_equal(exact.k[0, :, : len(held)], k[0][:, held])
    other = LayerCache(CODEC, 1, TorchArrays(), pool=cache.pool)
    other.insert(0, cache.row_pages(0).copy(), cache.page_starts(0).copy())
    cache.pool.share(cache.row_pages(0))
    q = torch.randn(1, 4, 1, 64)
    want = ops.decode_attention(q, CODEC, other.table, exact, 0.125, causal=False)[0]
    torch.testing.assert_close(cache.attend(q, 0.125, causal=False)[0], want, rtol=0, atol=0)
    assert table is not None
    assert table.max_length == len(pages)


@pytest.mark.parametrize("to", [999, 990, 937, 870, 700, 500, 300, 130, 40, 3, 0])
def test_trim_counts_evicted_tokens(to):
    """After a trim the cache holds what remains of the positions below, and goes on from there."""
    cache = make(Recency(0.5), on_evict="host")
    read(cache, 1000)
    before, waiting = records(cache), cache.eviction.demoted[0]
    cache.trim(1000 - to)
    assert cache.lengths.tolist() == [to]
    after = records(cache)
    assert after == {start: record for start, record in before.items() if start + PAGE <= to}
    cut = [start for start in before if start < to < start + PAGE]
    recent = int(cache.exact_lengths[0]) - min(to, SINKS)
    if cut:
        assert recent == to - cut[0]
    else:
        first_recent = max([*list(before), SINKS - PAGE]) + PAGE
        assert recent == max(0, to - max(first_recent, SINKS))
    assert cache.eviction.demoted[0] <= waiting
    read(cache, 200, seed=5)
    assert cache.lengths.tolist() == [to + 200]
    starts = cache.page_starts(0)
    assert (np.diff(starts) >= PAGE).all()


def test_a_failed_append_changes_nothing(monkeypatch):
    cache = make(V1(0.3), on_evict="host")
    read(cache, 600)
    cache.append(*tokens(256, seed=2))  # a round is due, and has to give up pages
    kept, counts = records(cache), copy.copy(cache.eviction.counts)
    state = cache.exact_lengths, cache.lengths, cache.eviction.demoted, cache.eviction.store.nbytes
    k, v = tokens(64)
    k[0, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="expected finite k"):
        cache.append(k, v)

    def full(page: Any) -> Any:
        raise OSError("no space left")

    monkeypatch.setattr(cache.eviction.store, "_write", full)
    with pytest.raises(OSError, match="no space left"):
        cache.append(*tokens(64))
    assert (records(cache), cache.eviction.counts) == (kept, counts)
    now = cache.exact_lengths, cache.lengths, cache.eviction.demoted, cache.eviction.store.nbytes
    assert [np.array_equal(a, b) for a, b in zip(now, state)] == [True] * 4


def towards(page):
    """A query that looks for a demoted page alone."""
    mean = torch.from_numpy(page.note.mean[0])
    return 40 * mean / mean.norm()


@pytest.mark.parametrize("on_evict", ["host", "disk"])
def test_demoted_pages_come_back_bit_for_bit(on_evict):
    cache, plain = make(Recency(0.5), on_evict=on_evict, recall_share=0.3, recall_pages=2), whole(1000)
    read(cache, 1000, look=False)
    gone = [d.start for d in cache.eviction.history.demoted[0]]
    assert gone
    assert not set(gone) & set(records(cache))
    assert cache.eviction.store.nbytes == len(gone) * CODEC.page_bytes
    target = cache.eviction.history.demoted[0][1]
    q = torch.zeros(1, 4, 1, 64)
    q[0, 1, 0] = towards(target)
    cache.prepare(q, 1.0, 1)
    assert records(cache)[target.start] == plain[target.start]
    assert cache.eviction.counts.recalled == 1
    assert cache.eviction.demoted[0] == len(gone) - 1
    # guests stay for two intervals and are not more than two
    cache.eviction.gathers = False
    cache.append(*tokens(64, seed=7))
    assert target.start in records(cache)
    for d in list(cache.eviction.history.demoted[0]):
        q[0, 1, 0] = towards(d)
        cache.prepare(q, 1.0, 1)
        assert records(cache)[d.start] == plain[d.start]
        assert len(cache.eviction.history.guests[0]) == 2
    # one that nobody wants any more went for each that came
    assert len(set(gone) & set(records(cache))) == 2
    assert cache.eviction.counts.recalled == len(gone)
    held = sorted([*records(cache), *(d.start for d in cache.eviction.history.demoted[0])])
    assert held == list(range(held[0], held[-1] + 1, PAGE))
    cache.trim(cache.lengths)
    assert cache.eviction.store.nbytes == 0
    assert cache.pool.in_use == 0


def test_forks_share_what_was_demoted():
    cache = make(Recency(0.5), batch=2, on_evict="host")
    read(cache, 700)
    held = cache.eviction.store.nbytes
    other = cache.fork([1, 1, 0])
    assert other.eviction.demoted == [cache.eviction.demoted[1], cache.eviction.demoted[1], cache.eviction.demoted[0]]
    assert other.eviction.store is cache.eviction.store
    assert cache.eviction.store.nbytes == held
    assert records(other, 2) == records(cache, 0)
    cache.select([1])
    cache.trim(cache.lengths)
    assert other.eviction.store.nbytes == held
    joined = make(Recency(0.5), batch=0, on_evict="host", pool=PagePool(CODEC.page_bytes, TorchArrays()))
    joined.join(other)
    assert joined.eviction.demoted == other.eviction.demoted
    assert records(joined, 2) == records(other, 2)
    del other
    assert cache.eviction.store.nbytes == 0
    assert joined.eviction.store.nbytes > 0


def test_ragged_rows_evict_each_for_itself():
    cache = make(Recency(0.5), batch=2)
    k, v = tokens(900, 2)
    keep = np.ones((2, 900), bool)
    keep[1, :500] = False
    for at in range(0, 900, 90):
        part = slice(at, at + 90)
        cache.append(k[:, :, part], v[:, :, part], keep[:, part])
    alone = make(Recency(0.5))
    for at in range(0, 900, 90):
        if keep[1, at : at + 90].any():
            real = slice(max(at, 500), at + 90)
            alone.append(k[1:, :, real], v[1:, :, real])
    assert cache.lengths.tolist() == [900, 400]
    assert records(cache, 1) == records(alone)
    assert len(records(cache, 0)) < 12


def test_memory_is_given_back():
    cache = make(Recency(0.25))
    k, v = tokens(2600)
    cache.append(k, v)  # all at once: no round yet
    before = cache.pool.nbytes
    pages = records(cache)
    cache.append(k[:, :, :1], v[:, :, :1])
    after = records(cache)
    assert all(pages[start] == record for start, record in after.items())
    assert cache.pool.nbytes < before / 2
    fork = cache.fork()
    cache.pool.compact()
    assert records(fork) == records(cache) == after
    q = torch.randn(1, 4, 1, 64)
    torch.testing.assert_close(fork.attend(q, 0.1)[0], cache.attend(q, 0.1)[0], rtol=0, atol=0)


def test_compaction_moves_pages_of_a_shared_pool():
    """Every cache of the pool finds its pages again, also one that appends before it looks."""
    pool = PagePool(CODEC.page_bytes, TorchArrays())
    a, b = (LayerCache(CODEC, 1, TorchArrays(), pool=pool) for _ in range(2))
    k, v = read(a, 700)
    read(b, 700, seed=3)
    plain = records(b)
    a.trim(600)
    pool.compact()
    assert pool.spare == 0
    b.append(k[:, :, :200], v[:, :, :200])
    found = records(b)
    assert plain.items() <= found.items()
    addresses = b.table.page_table[0, : len(found)].tolist()
    assert addresses == [pool.page(page).data_ptr() for page in b.row_pages(0).tolist()]


def test_stores_are_bounded_and_checked(tmp_path):
    page = np.arange(32, dtype=np.uint8)
    for store in (HostStore(32, 64), DiskStore(32, 64, tmp_path)):
        a, b = store.put(page), store.put(page[::-1].copy())
        with pytest.raises(ValueError, match=r"\[store\] expected at most 64 bytes"):
            store.put(page)
        store.share(a)
        store.free(a)
        np.testing.assert_array_equal(store.get(a), page)
        store.free(a)
        c = store.put(page + 1)
        np.testing.assert_array_equal(store.get(c), page + 1)
        np.testing.assert_array_equal(store.get(b), page[::-1])
        assert store.nbytes == 64
    os.pwrite(store._file.fileno(), b"x", 40)
    with pytest.raises(ValueError, match=r"\[store\] expected page 1 as it was written"):
        store.get(b)
    assert not list(tmp_path.iterdir())


def test_forked_processes_do_not_write_over_each_other(tmp_path):
    """Both read what was there before, and what each has put since; the child's pages take no room of the parent's."""
    rng = np.random.default_rng(0)
    old, parents, childs = (rng.integers(0, 256, (8, 32), np.uint8) for _ in range(3))
    store = DiskStore(32, None, tmp_path)
    before = [store.put(page) for page in old]
    for number in before[6:]:
        store.free(number)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            mine = [store.put(page) for page in childs]
            os.write(ready[1], b"1")
            os.read(go[0], 1)
            good = all((store.get(n) == page).all() for n, page in zip(mine, childs))
            good &= all((store.get(n) == page).all() for n, page in zip(before[:6], old))
            store.free(before[0])
            store.put(childs[0])
            os._exit(0 if good else 1)
        except BaseException:
            os._exit(2)
    os.read(ready[0], 1)
    store.free(before[5])  # its place is still the child's
    mine = [store.put(page) for page in parents]
    os.write(go[1], b"1")
    assert os.waitpid(child, 0)[1] == 0
    assert all((store.get(n) == page).all() for n, page in zip(mine, parents))
    assert all((store.get(n) == page).all() for n, page in zip(before[:5], old))
    assert not list(tmp_path.iterdir())


def test_what_a_full_store_cannot_take_is_lost_and_counted():
    cache = make(Recency(0.5), on_evict="host", max_bytes=2 * CODEC.page_bytes)
    read(cache, 1000, look=False)
    counts = cache.eviction.counts
    assert (cache.eviction.demoted[0], counts.demoted) == (2, 2)
    assert counts.lost == counts.evicted - 2 > 0


def test_mass_estimates_are_exact_where_pages_are_their_means():
    rng = np.random.default_rng(0)
    means = rng.standard_normal((5, 2, 8))
    q = rng.standard_normal((4, 3, 8))
    k = np.repeat(means, PAGE, 0)
    want = np.zeros((4, 3, 5))
    for h in range(4):
        s = np.exp(0.5 * q[h] @ k[:, h // 2].T)
        want[h] = (s / s.sum(1, keepdims=True)).reshape(3, 5, PAGE).sum(2)
    got = mass_estimates(q, means, 0.5)
    np.testing.assert_allclose(got, want.max((0, 1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("share", "guests", "room", "most", "come", "go"),
    [
        ([0.1, 0.5, 0.01], [], 4, 4, [1, 0], []),
        ([0.1, 0.5, 0.2], [], 1, 4, [1], []),
        ([0.1, 0.5, 0.2], [0.3, 0.2], 0, 2, [1], [1]),
        ([0.1, 0.5, 0.4], [0.01, 0.02], 0, 2, [1, 2], [0, 1]),
        ([0.1, 0.5, 0.4], [0.01, 0.02], 1, 2, [1, 2], [0]),
        ([0.1, 0.5, 0.4], [0.01, 0.02], 0, 0, [], []),
        ([0.01, 0.02], [0.001], 0, 1, [], []),
    ],
)
def test_who_comes_and_who_goes(share, guests, room, most, come, go):
    assert visitors(np.array(share), np.array(guests), 0.05, room, most) == (come, go)


def test_a_full_store_costs_no_guest():
    """A guest that has no room in the store stays, and the page that wants its place does not come."""
    cache = make(Recency(0.5), on_evict="host", recall_share=0.3, recall_pages=1, max_bytes=4 * CODEC.page_bytes)
    read(cache, 1000, look=False)
    cache.eviction.gathers = False
    q = torch.zeros(1, 4, 1, 64)
    before = {*records(cache), *(d.start for d in cache.eviction.history.demoted[0])}
    for d in list(cache.eviction.history.demoted[0]):
        q[0, 1, 0] = towards(d)
        cache.prepare(q, 1.0, 1)
        assert {*records(cache), *(d.start for d in cache.eviction.history.demoted[0])} == before
    assert cache.eviction.counts.recalled > 1


def test_a_policy_that_scores_needs_a_rotation():
    with pytest.raises(ValueError, match=r"\[eviction\] expected the model's rope"):
        Evictor(Eviction(V1()), None)
    cache = LayerCache(CODEC, 1, TorchArrays(), eviction=Evictor(Eviction(Recency(0.5)), None))
    read(cache, 700)
    assert cache.eviction.counts.evicted
    assert cache.eviction.counts != Counts()
