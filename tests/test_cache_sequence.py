"""One layer's cache: segments, trims, forks, batches."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from cache_model import Row, assert_agrees

from forgeattention import CodecSpec
from forgeattention.cache import LayerCache, NumpyArrays, TorchArrays
from forgeattention.codec import PAGE, Codec

CODEC = Codec(CodecSpec(k_bits=2, v_bits=2, sinks=3, window=70), 64, 2)


def tokens(batch: int, n: int, seed: int = 0, codec: Codec = CODEC) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    shape = (batch, codec.kv_heads, n, codec.head_dim)
    return torch.randn(shape, generator=made), torch.randn(shape, generator=made)


def listed(k: Any, v: Any, row: int) -> list[Any]:
    return [(np.asarray(k[row, :, i]), np.asarray(v[row, :, i])) for i in range(k.shape[2])]


def made(batch: int = 2, arrays: Any = None, codec: Codec = CODEC, **options: Any) -> LayerCache:
    return LayerCache(codec, batch, arrays or TorchArrays(), backend="reference", **options)


@pytest.mark.parametrize("arrays", [NumpyArrays(), TorchArrays()], ids=["numpy", "torch"])
@pytest.mark.parametrize("steps", [[300], [1] * 140 + [7] * 20, [2, 1, 133, 5, 64, 70, 25], [136, 1, 128]])
def test_append_in_any_steps(arrays: Any, steps: list[int]) -> None:
    k, v = tokens(2, sum(steps))
    cache, rows, at = made(arrays=arrays), [Row(CODEC), Row(CODEC)], 0
    for n in steps:
        new = k[:, :, at : at + n], v[:, :, at : at + n]
        cache.append(*(x if isinstance(arrays, TorchArrays) else x.numpy() for x in new))
        for row, plain in enumerate(rows):
            plain.append(listed(*new, row))
        at += n
    assert_agrees(cache, rows)


@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (0, 128), (4, 0), (70, 5), (1, 64)])
def test_sinks_and_window_of_any_size(sinks: int, window: int) -> None:
    codec = Codec(CodecSpec(k_bits=2, v_bits=2, sinks=sinks, window=window), 64, 1)
    k, v = tokens(1, 420, codec=codec)
    cache, row, at = made(1, codec=codec), Row(codec), 0
    for n in (1, 90, 1, 1, 200, 63, 64):
        cache.append(k[:, :, at : at + n], v[:, :, at : at + n])
        row.append(listed(k[:, :, at : at + n], v[:, :, at : at + n], 0))
        at += n
        assert_agrees(cache, [row])
    cache.trim(150)
    row.trim(150)
    assert_agrees(cache, [row])


def test_rows_of_other_lengths() -> None:
    k, v = tokens(3, 200)
    keep = np.ones((3, 200), np.bool_)
    keep[0, :57] = False
    keep[1, 150:] = False
    keep[2, ::3] = False
    cache, rows = made(3), [Row(CODEC) for _ in range(3)]
    cache.append(k, v, keep)
    for row, plain in enumerate(rows):
        plain.append([t for t, real in zip(listed(k, v, row), keep[row]) if real])
    assert_agrees(cache, rows)
    assert not cache.rows.uniform
    for step in range(70):
        new = tokens(3, 1 + step % 3, seed=step)
        cache.append(*new)
        for row, plain in enumerate(rows):
            plain.append(listed(*new, row))
    assert_agrees(cache, rows)


def test_the_exact_buffer_does_not_grow_with_the_context() -> None:
    short, long = made(1), made(1)
    short.append(*tokens(1, 5))
    long.append(*tokens(1, 2000))
    pages = int(long.packed_lengths[0]) // PAGE
    assert long.pool.nbytes == pages * CODEC.page_bytes
    assert long.nbytes - long.pool.nbytes - short.nbytes == 8 * pages


def test_nbytes_counts_every_array() -> None:
    cache = made(2)
    cache.append(*tokens(2, 500))
    held = {id(x): x for part in (cache.rows, cache.buffer) for x in vars(part).values() if isinstance(x, torch.Tensor)}
    named = sum(x.untyped_storage().nbytes() for x in held.values())
    slabs = sum(slab.data.untyped_storage().nbytes() for slab in cache.pool._slabs)
    assert cache.nbytes == named + slabs


def test_trim_returns_a_cut_page_from_its_codes() -> None:
    cache, row = made(1), Row(CODEC)
    new = tokens(1, 300)
    cache.append(*new)
    row.append(listed(*new, 0))
    assert len(row.packed) == 192
    cache.trim(130)
    row.trim(130)
    assert (len(row.packed), len(row.recent)) == (128, 39)
    assert_agrees(cache, [row])
    assert cache.pool.in_use == 2


def test_trim_of_each_row_by_its_own() -> None:
    cache, rows = made(3), [Row(CODEC) for _ in range(3)]
    new = tokens(3, 300)
    cache.append(*new)
    for i, (row, n) in enumerate(zip(rows, (0, 299, 173))):
        row.append(listed(*new, i))
        row.trim(n)
    cache.trim([0, 299, 173])
    assert_agrees(cache, rows)


def test_fork_and_reorder_share_pages() -> None:
    cache = made(2)
    cache.append(*tokens(2, 300))
    pages = cache.pool.in_use
    other = cache.fork()
    cache.select([1, 1, 0])
    assert cache.pool.in_use == pages
    other.append(*tokens(2, 64, seed=1))
    assert cache.pool.in_use == pages + 2
    del other
    cache.select([2])
    assert cache.pool.in_use == pages // 2
    cache.clear()
    assert (cache.pool.in_use, cache.pool.nbytes, cache.batch) == (0, 0, 1)


@pytest.mark.parametrize("own_pool", [False, True])
def test_rows_join_and_leave(own_pool: bool) -> None:
    one, two = made(1), made(2)
    first, second = tokens(1, 250), tokens(2, 320, seed=1)
    if not own_pool:
        two = made(2, pool=one.pool)
    one.append(*first)
    two.append(*second)
    one.join(two)
    rows = [Row(CODEC) for _ in range(3)]
    for row, (new, i) in zip(rows, ((first, 0), (second, 0), (second, 1))):
        row.append(listed(*new, i))
    del two
    assert_agrees(one, rows)
    one.select([2, 0])
    new = tokens(2, 100, seed=2)
    one.append(*new)
    rows = [rows[2], rows[0]]
    for i, row in enumerate(rows):
        row.append(listed(*new, i))
    assert_agrees(one, rows)


def test_a_copy_is_a_fork() -> None:
    cache = made(1)
    cache.append(*tokens(1, 300))
    for other in (copy.copy(cache), copy.deepcopy(cache)):
        other.trim(300)
        assert (cache.lengths[0], other.lengths[0]) == (300, 0)
    with pytest.raises(TypeError, match=r"expected forgeattention\.cache\.save; got pickle"):
        pickle.dumps(cache)


def bad_appends() -> dict[str, tuple[Any, str]]:
    k, v = tokens(2, 100)
    nan, inf = k.clone(), v.clone()
    nan[1, 1, 50, 3], inf[0, 0, 99, 0] = torch.nan, -torch.inf
    huge = k.clone()
    huge[1, 1, 5] = 1e30
    return {
        "NaN": ((nan, v), r"\[cache.append\] expected finite k; got NaN"),
        "infinity": ((k, inf), r"\[cache.append\] expected finite v; got NaN"),
        "too large for a scale": ((huge, v), r"\[encode\] expected vectors that fp16 scales can hold; got"),
        "rows": ((k[:1], v[:1]), r"\[cache.append\] expected k \[2, 2, n, 64\]; got \[1, 2, 100, 64\]"),
        "heads": ((k[:, :1], v[:, :1]), r"\[cache.append\] expected k \[2, 2, n, 64\]; got"),
        "head_dim": ((k[..., :32], v[..., :32]), r"\[cache.append\] expected k"),
        "lengths": ((k, v[:, :, :99]), r"\[cache.append\] expected v \[2, 2, n, 64\]; got \[2, 2, 99, 64\]"),
        "rank": ((k[0], v[0]), r"\[cache.append\] expected k"),
        "dtype": ((k.half(), v.half()), r"\[cache.append\] expected k in float32 on the cache's device; got"),
        "framework": ((k.numpy(), v.numpy()), r"\[cache.append\] expected k in float32 on the cache's device; got"),
        "keep": (
            (k, v, np.ones((2, 99), np.bool_)),
            r"\[cache.append\] expected keep bool \[2, 100\]; got bool \[2, 99\]",
        ),
        "full pool": ((*tokens(2, 900),), r"\[page_pool\] expected at most 20 pages; got"),
    }


@pytest.mark.parametrize("what", bad_appends())
def test_a_bad_append_changes_nothing(what: str) -> None:
    arguments, message = bad_appends()[what]
    cache, rows = made(2, max_pages=20), [Row(CODEC), Row(CODEC)]
    new = tokens(2, 180, seed=3)
    cache.append(*new)
    for i, row in enumerate(rows):
        row.append(listed(*new, i))
    pages, size = cache.pool.in_use, cache.nbytes
    with pytest.raises(ValueError, match=message):
        cache.append(*arguments)
    assert_agrees(cache, rows)
    assert (cache.pool.in_use, cache.nbytes) == (pages, size)


def test_other_bad_calls_change_nothing() -> None:
    cache, row = made(1), Row(CODEC)
    new = tokens(1, 180)
    cache.append(*new)
    row.append(listed(*new, 0))
    for n in (181, -1):
        with pytest.raises(ValueError, match=r"\[cache.trim\] expected 0 <= n <= tokens \[180\]; got"):
            cache.trim(n)
    for rows in ([1], [0, -1]):
        with pytest.raises(ValueError, match=r"\[cache.select\] expected rows in \[0, 1\); got"):
            cache.select(rows)
    other = Codec(CodecSpec(k_bits=4, v_bits=2, sinks=3, window=70), 64, 2)
    with pytest.raises(ValueError, match=r"\[cache.join\] expected codec"):
        cache.join(made(1, codec=other))
    assert_agrees(cache, [row])
    with pytest.raises(ValueError, match=r"\[cache\] expected a pool of"):
        made(1, codec=other, pool=cache.pool)
    with pytest.raises(ValueError, match=r"\[cache\] expected batch >= 0 and dtype in"):
        LayerCache(CODEC, 1, NumpyArrays(), "float64")
