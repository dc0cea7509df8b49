"""A few tokens at once give what single tokens give: attention, pages, and what is left when the newest go again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import CPU_ATTENTION

from forgeattention import CodecSpec
from forgeattention.cache import STEP_TOKENS, LayerCache, PagePool, TorchArrays
from forgeattention.codec import PAGE, Codec

CODEC = Codec(CodecSpec(sinks=4, window=16), 64, 2)
FULL = CODEC.spec.sinks + CODEC.spec.window + PAGE
SCALE = 0.125


def tokens(rows: int, n: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """q, k, v of n tokens."""
    made = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, heads, n, 64, generator=made) for heads in (6, 2, 2))


def filled(lengths: list[int], **options: Any) -> LayerCache:
    """Rows of so many tokens."""
    cache = LayerCache(CODEC, len(lengths), TorchArrays(), **options)
    _, k, v = tokens(len(lengths), max(lengths), 7)
    cache.append(k, v, np.arange(max(lengths)) < np.array(lengths)[:, None])
    return cache


def contents(cache: LayerCache) -> list[Any]:
    """All that the rows hold, bytes of pages included."""
    out: list[Any] = [cache.lengths.tolist(), cache.packed_lengths.tolist()]
    for row in range(cache.batch):
        held = int(cache.exact_lengths[row])
        out.append([x[row, :, :held].tolist() for x in (cache.exact.k, cache.exact.v)])
        out.append([cache.pool.page(page).tolist() for page in cache.row_pages(row).tolist()])
        out.append(cache.page_starts(row).tolist())
    return out


def singly(cache: LayerCache, q: Any, k: Any, v: Any) -> torch.Tensor:
    """What single steps give, [rows, q_heads, n, head_dim]."""
    at = range(k.shape[2])
    return torch.cat([cache.step(*(x[:, :, i : i + 1] for x in (q, k, v)), SCALE) for i in at], 2)


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= 2 * CPU_ATTENTION["float32"] * float(b.abs().max())


LENGTHS = st.lists(st.integers(1, 2 * FULL), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, pieces=st.lists(st.tuples(st.integers(1, STEP_TOKENS), st.integers(0, 7)), max_size=8))
def test_pieces_and_cuts_leave_what_single_tokens_leave(lengths: list[int], pieces: list[tuple[int, int]]) -> None:
    cache, single = filled(lengths), filled(lengths)
    for number, (n, cut) in enumerate(pieces):
        q, k, v = tokens(len(lengths), n, 100 + number)
        kept = max(1, n - cut)
        found = cache.step(q, k, v, SCALE)
        cache.trim(n - kept)
        wanted = singly(single, *(x[:, :, :kept] for x in (q, k, v)))
        assert near(found[:, :, :kept], wanted)
        assert contents(cache) == contents(single)


def test_a_piece_that_packs_is_seen() -> None:
    # so that the test above could fail: a page's exact tokens and its codes give other results
    cache, other = filled([FULL - 3]), filled([FULL - 3])
    q, k, v = tokens(1, 5)
    found = cache.step(q, k, v, SCALE)
    other.append(k, v)
    assert cache.packed_lengths[0] == other.packed_lengths[0] == PAGE
    later = other.attend(q, SCALE)[0]
    assert near(found[:, :, 2:], later[:, :, 2:])
    assert not near(found[:, :, :2], later[:, :, :2])


def test_only_some_queries_are_asked() -> None:
    for m in (1, 3, 4):
        cache, single = filled([FULL - 3]), filled([FULL - 3])
        q, k, v = tokens(1, 5)
        assert near(cache.step(q[:, :, -m:], k, v, SCALE), singly(single, q, k, v)[:, :, -m:])
        assert contents(cache) == contents(single)


def test_rows_cut_at_different_places_in_two_cuts() -> None:
    before, cut = [FULL - 3, FULL - 6, 40], [4, 1, 5]
    cache = filled(before)
    q, k, v = tokens(3, 6)
    cache.step(q, k, v, SCALE)
    cache.trim([1, 1, 0])
    cache.trim([3, 0, 5])
    for row, (length, drop) in enumerate(zip(before, cut)):
        alone = filled(before).fork([row])
        assert alone.lengths[0] == length
        if drop < 6:
            singly(alone, *(x[row : row + 1, :, : 6 - drop] for x in (q, k, v)))
        assert contents(cache.fork([row])) == contents(alone)
    cache.trim([5, 8, 3])  # more than the piece had
    assert cache.lengths.tolist() == [a + 6 - b - c for a, b, c in zip(before, cut, [5, 8, 3])]


def test_what_cannot_be_cut_changes_nothing() -> None:
    cache = filled([FULL - 3])
    cache.step(*tokens(1, 6), SCALE)
    held, known = contents(cache), cache.undo
    assert known is not None
    for wrong in (-1, 10_000):
        with pytest.raises(ValueError, match=r"\[cache.trim\] expected"):
            cache.trim(wrong)
    assert contents(cache) == held
    assert cache.undo is known


def test_a_change_in_between_forgets_the_way_back() -> None:
    _, k, v = tokens(1, 1)
    for change in (lambda c: c.append(k, v), lambda c: c.evict(0, np.array([True])), lambda c: c.select([0])):
        cache = filled([FULL - 3])
        cache.step(*tokens(1, 6), SCALE)
        change(cache)
        pages = cache.packed_lengths[0]
        cache.trim(5)
        assert cache.packed_lengths[0] == pages


def test_a_full_pool_leaves_all_as_it_was() -> None:
    pool = PagePool(CODEC.page_bytes, TorchArrays(), 1)
    cache = filled([FULL - 3, FULL - 5], pool=pool)
    held = contents(cache)
    with pytest.raises(ValueError, match="page"):
        cache.step(*tokens(2, 8), SCALE)
    assert contents(cache) == held
    assert pool.in_use == 0


@pytest.mark.parametrize("n", [1, 3, 8])
def test_a_short_piece_in_a_padded_one_is_what_it_is_alone(n: int) -> None:
    # The other row's piece is a chunk of 30.
    for length in range(FULL - 9, FULL + 2):
        batch, alone = filled([200, length]), filled([200, length]).fork([1])
        q, k, v = tokens(2, 30)
        for real in (np.arange(30) < n, np.arange(30) >= 30 - n, np.isin(np.arange(30), np.arange(0, 3 * n, 3)[:n])):
            cache, single, at = batch.fork(), alone.fork(), torch.from_numpy(np.flatnonzero(real))
            found = cache.step(q, k, v, SCALE, keep=np.stack([np.ones(30, np.bool_), real]))
            wanted = single.step(*(x[1:, :, at] for x in (q, k, v)), SCALE)
            assert near(found[1:, :, at], wanted)
            assert contents(cache.fork([1])) == contents(single)
