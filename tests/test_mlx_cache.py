"""The cache class by itself: mlx-lm's contract for single and batched caches."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_lm.models import base  # noqa: E402
from mlx_lm.models import cache as stock  # noqa: E402
from mlx_models import SPEC, coded, model  # noqa: E402
from tolerances import MLX_CPU  # noqa: E402

from forgeattention.codec import Codec, CodecSpec  # noqa: E402
from forgeattention.integrations.mlx import PackedKVCache, make_prompt_cache, patched  # noqa: E402
from forgeattention.sparse import SparseSpec  # noqa: E402

CONTRACT = [
    *("update_and_fetch", "offset", "state", "from_state", "is_trimmable", "trim", "make_mask", "size", "empty"),
    *("nbytes", "merge", "filter", "extend", "extract", "prepare", "finalize", "keys_and_values"),
]


@pytest.fixture(autouse=True)
def seam() -> Any:
    with patched():
        yield


def normal(rows: int, n: int, seed: int, heads: int = 2, dtype: str = "float32") -> Any:
    x = np.random.default_rng(seed).standard_normal((rows, n, heads, 64)).astype(np.float32)
    return mx.array(x).astype(getattr(mx, dtype)).swapaxes(1, 2)


def step(cache: Any, n: int, seed: int, rows: int = 1, dtype: str = "float32", sinks: Any = None) -> Any:
    """Attention of n random tokens through mlx-lm's function, as a layer of a model calls it."""
    q, k, v = (normal(rows, n, 3 * seed + i, heads, dtype) for i, heads in enumerate((4, 2, 2)))
    mask = cache.make_mask(n)
    k, v = cache.update_and_fetch(k, v)
    return base.scaled_dot_product_attention(q, k, v, cache=cache, scale=0.125, mask=mask, sinks=sinks)


def filled(lengths: list[int], spec: CodecSpec = SPEC) -> list[PackedKVCache]:
    """Single caches of the given lengths with tokens of their own."""
    out = []
    for i, n in enumerate(lengths):
        out.append(PackedKVCache(spec))
        if n:
            step(out[-1], n, 10 + i)
    return out


def same(a: Any, b: Any) -> bool:
    return bool(mx.array_equal(a, b))


def test_the_contract_is_that_of_the_stock_batched_cache() -> None:
    assert set(CONTRACT) >= {n for n in dir(stock.BatchKVCache) if not n.startswith("_")} - {"step"}
    assert set(CONTRACT) >= {n for n in dir(stock.KVCache) if not n.startswith("_")} - {"step", "to_quantized"}
    made = PackedKVCache()
    assert all(hasattr(made, name) for name in CONTRACT)
    # mlx-lm takes a cache with this attribute for its own quantised one
    assert not hasattr(made, "bits")


def test_offsets_sizes_and_trims_are_those_of_the_stock_cache() -> None:
    ours, theirs = PackedKVCache(SPEC), stock.KVCache()
    assert (ours.offset, ours.size(), ours.empty(), ours.nbytes) == (0, 0, True, 0)
    for i, n in enumerate((100, 1, 5, 40, 1)):
        assert ours.make_mask(n) == theirs.make_mask(n, return_array=False, window_size=None)
        assert same(ours.make_mask(n, return_array=True), base.create_causal_mask(n, theirs.offset))
        step(ours, n, i)
        theirs.update_and_fetch(normal(1, n, 1), normal(1, n, 2))
        assert (ours.offset, ours.size(), ours.empty()) == (theirs.offset, theirs.size(), False)
    assert ours.cache is not None
    assert ours.cache.packed_lengths.tolist() == [128]
    assert ours.is_trimmable()
    for n in (3, 60, 1000):
        assert ours.trim(n) == theirs.trim(n)
        assert (ours.offset, ours.size()) == (theirs.offset, theirs.size())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_is_that_over_the_decoded_tokens(dtype: str, sinks: bool) -> None:
    logits = mx.array([0.5, -1.0, 3.0, 1.0]).astype(getattr(mx, dtype)) if sinks else None
    cache, k, v = PackedKVCache(SPEC), [], []
    codec, pages = Codec(SPEC, 64, 2), 0
    for i, n in enumerate((70, 1, 30, 6, 1, 50)):
        out = step(cache, n, i, dtype=dtype, sinks=logits)
        q = normal(1, n, 3 * i, 4, dtype)
        k, v = [*k, normal(1, n, 3 * i + 1, 2, dtype)], [*v, normal(1, n, 3 * i + 2, 2, dtype)]
        if n > 8:
            want = stock_attention(q, k, v, logits)
        all_k, all_v = mx.concatenate(k, axis=2), mx.concatenate(v, axis=2)
        while all_k.shape[2] - SPEC.sinks - 64 * pages >= SPEC.window + 64:
            at = slice(SPEC.sinks + 64 * pages, SPEC.sinks + 64 * (pages + 1))
            all_k[0, :, at], all_v[0, :, at] = coded(codec, all_k[0, :, at], all_v[0, :, at])
            pages += 1
        k, v = [all_k], [all_v]
        if n <= 8:
            want = stock_attention(q, k, v, logits)
        assert out.dtype == getattr(mx, dtype)
        error = mx.abs(out.astype(mx.float32) - want).max()
        assert float(error) <= 2 * MLX_CPU[dtype] * float(mx.abs(want).max())
    assert pages == 2


def stock_attention(q: Any, k: Any, v: Any, sinks: Any) -> Any:
    k, v = (mx.concatenate(x, axis=2).astype(mx.float32) for x in (k, v))
    sinks = None if sinks is None else sinks.astype(mx.float32)
    return mx.fast.scaled_dot_product_attention(q.astype(mx.float32), k, v, scale=0.125, mask="causal", sinks=sinks)


def test_rows_of_a_batch_are_what_they_are_alone() -> None:
    singles, lengths = filled([90, 0, 200, 30]), [90, 0, 200, 30]
    batch = singles[0].merge(singles)
    assert batch.offset.tolist() == lengths
    assert batch.size() == 200
    found = step(batch, 1, 5, rows=4)
    for row, single in enumerate(singles):
        q, k, v = (normal(4, 1, 15 + i, heads)[row : row + 1] for i, heads in enumerate((4, 2, 2)))
        k, v = single.update_and_fetch(k, v)
        alone = base.scaled_dot_product_attention(q, k, v, cache=single, scale=0.125, mask=None)
        assert same(found[row : row + 1], alone)


def test_filter_extend_and_extract() -> None:
    a, b = (filled(lengths) for lengths in ([90, 140, 0], [20, 260]))
    batch = a[0].merge(a)
    batch.filter([2, 1])
    batch.extend(b[0].merge(b))
    assert batch.offset.tolist() == [0, 140, 20, 260]
    batch.filter(mx.array([1, 3]))
    expected = (a[1], b[1])
    for row, single in enumerate(expected):
        out = batch.extract(row)
        assert out.offset == single.offset
        assert not out.batched
        assert out.cache is not None
        assert out.cache.pool is not batch.cache.pool
        assert same(step(out, 1, 3), step(copy.deepcopy(single), 1, 3))
    batch.filter([])
    assert batch.offset.tolist() == []


def test_empty_caches_merge_and_then_fill() -> None:
    singles = filled([0, 0])
    batch = singles[0].merge(singles)
    assert batch.empty()
    assert batch.offset.tolist() == [0, 0]
    assert step(batch, 20, 1, rows=2).shape == (2, 4, 20, 64)
    assert batch.offset.tolist() == [20, 20]


@pytest.mark.parametrize("chunks", [[100], [33, 33, 34], [99, 1]])
def test_right_padding_leaves_no_trace(chunks: list[int]) -> None:
    # Rows 0 and 1 read prompts of 100 and 40 tokens, in chunks of one padded prompt.
    singles = filled([90, 30])
    batch = singles[0].merge(singles)
    batch.prepare(lengths=[100, 40], right_padding=[0, 60])
    q, k, v = (normal(2, 100, 50 + i, heads) for i, heads in enumerate((4, 2, 2)))
    at, outs = 0, []
    for n in chunks:
        part = slice(at, at + n)
        mask = batch.make_mask(n)
        handles = batch.update_and_fetch(k[:, :, part], v[:, :, part])
        outs.append(base.scaled_dot_product_attention(q[:, :, part], *handles, cache=batch, scale=0.125, mask=mask))
        at += n
    batch.finalize()
    assert batch.offset.tolist() == [190, 70]
    assert batch.cache is not None
    found = mx.concatenate(outs, axis=2)
    for row, (single, n) in enumerate(zip(singles, (100, 40))):
        at = 0
        for size in chunks:
            part = slice(at, min(at + size, n))
            if part.start >= n:
                break
            mask = single.make_mask(part.stop - part.start)
            handles = single.update_and_fetch(k[row : row + 1, :, part], v[row : row + 1, :, part])
            own = q[row : row + 1, :, part]
            alone = base.scaled_dot_product_attention(own, *handles, cache=single, scale=0.125, mask=mask)
            error = mx.abs(found[row : row + 1, :, part] - alone).max()
            assert float(error) <= 2 * MLX_CPU["float32"]
            at += size
    step(batch, 1, 77, rows=2)
    assert batch.offset.tolist() == [191, 71]


def test_left_padding_leaves_no_trace() -> None:
    single, batch = filled([0])[0], PackedKVCache(SPEC).merge(filled([0, 0]))
    batch.prepare(left_padding=[0, 25])
    assert batch.offset.tolist() == [0, -25]
    q, k, v = (normal(2, 120, 60 + i, heads) for i, heads in enumerate((4, 2, 2)))
    mask = batch.make_mask(120)
    found = base.scaled_dot_product_attention(q, *batch.update_and_fetch(k, v), cache=batch, scale=0.125, mask=mask)
    own = [x[1:, :, 25:] for x in (q, k, v)]
    alone = base.scaled_dot_product_attention(
        own[0], *single.update_and_fetch(*own[1:]), cache=single, scale=0.125, mask="causal"
    )
    assert float(mx.abs(found[1:, :, 25:] - alone).max()) <= 2 * MLX_CPU["float32"]
    assert not np.array(found[1, :, :25]).any()
    assert batch.offset.tolist() == [120, 95]
    assert batch.trim(7) == 7
    assert batch.offset.tolist() == [113, 88]
    with pytest.raises(ValueError, match=r"\[mlx_lm\] expected left padding before any token"):
        batch.prepare(left_padding=[1, 0])


def test_an_array_mask_must_be_causal_up_to_padding() -> None:
    batch = PackedKVCache(SPEC).merge(filled([90, 30]))
    theirs = stock.BatchKVCache.merge([stock_of(90), stock_of(30)])
    for n in (1, 12):
        assert same(batch.make_mask(n, return_array=True), theirs.make_mask(n))
        q, k, v = (normal(2, n, 70 + i, heads) for i, heads in enumerate((4, 2, 2)))
        right = batch.make_mask(n, return_array=True)
        before = batch.offset.tolist()
        for wrong in (mx.ones_like(right) if n > 1 else ~right, mx.zeros(right.shape), right[..., 1:], "full", None):
            if wrong is None and n == 1:
                continue
            handles = batch.update_and_fetch(k, v)
            with pytest.raises(ValueError, match=r"\[mlx_lm\] expected"):
                base.scaled_dot_product_attention(q, *handles, cache=batch, scale=0.125, mask=wrong)
            assert batch.offset.tolist() == before
        handles = batch.update_and_fetch(k, v)
        base.scaled_dot_product_attention(q, *handles, cache=batch, scale=0.125, mask=right)
        theirs.update_and_fetch(k, v)
    with pytest.raises(ValueError, match=r"\[mlx_lm\] expected full attention; got a window of 64"):
        batch.make_mask(1, window_size=64)


def stock_of(n: int) -> Any:
    made = stock.KVCache()
    made.update_and_fetch(normal(1, n, 1), normal(1, n, 2))
    return made


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("lengths", [[0, 0], [40, 3], [300, 77]])
def test_state_and_back(batched: bool, lengths: list[int]) -> None:
    singles = filled(lengths)
    cache = singles[0].merge(singles) if batched else singles[0]
    assert all(isinstance(x, mx.array) for x in cache.state)
    mx.eval(cache.state)
    back = PackedKVCache.from_state(cache.state)
    rows = 2 if batched else 1
    assert (back.batched, back.empty(), back.spec) == (cache.batched, cache.empty(), cache.spec)
    assert np.array(back.offset).tolist() == np.array(cache.offset).tolist()
    for i in range(2):
        assert same(step(cache, 1, i, rows=rows), step(back, 1, i, rows=rows))


def test_copies_go_their_own_ways() -> None:
    cache = filled([200])[0]
    other = copy.deepcopy(cache)
    assert other.cache is not None
    assert other.cache.pool is cache.cache.pool
    first = step(copy.deepcopy(cache), 1, 9)
    for i in range(30):
        step(other, 6, i)
    other.trim(100)
    assert cache.offset == 200
    assert same(step(cache, 1, 9), first)


def test_a_failed_step_leaves_the_cache_as_it_was() -> None:
    cache = filled([100])[0]
    want = step(copy.deepcopy(cache), 1, 3)
    bad = mx.where(mx.arange(64) == 5, mx.nan, normal(1, 20, 1))
    with pytest.raises(ValueError, match=r"\[cache\.append\] expected finite v"):
        cache.update_and_fetch(normal(1, 20, 1), bad)
    with pytest.raises(ValueError, match=r"\[cache\.append\] expected k"):
        cache.update_and_fetch(normal(1, 20, 1, heads=3), normal(1, 20, 1, heads=3))
    k, v = cache.update_and_fetch(normal(1, 20, 1), normal(1, 20, 2))
    with pytest.raises(ValueError, match="q_heads"):
        base.scaled_dot_product_attention(normal(1, 20, 3, heads=5), k, v, cache=cache, scale=0.125, mask="causal")
    assert cache.offset == 100
    assert same(step(cache, 1, 3), want)


def test_max_pages() -> None:
    cache = PackedKVCache(SPEC, max_pages=2)
    step(cache, 150, 0)
    with pytest.raises(ValueError, match=r"\[page_pool\] expected at most 2 pages"):
        step(cache, 64, 1)
    assert cache.offset == 150
    step(cache, 1, 2)


def test_models_that_read_keys_are_told() -> None:
    cache = filled([20])[0]
    k, _ = cache.update_and_fetch(normal(1, 5, 1), normal(1, 5, 2))
    assert k.shape == (1, 2, 25, 64)
    with pytest.raises(ValueError, match=r"\[mlx_lm\] expected a model that leaves keys .* reading \.swapaxes"):
        k.swapaxes(1, 2)
    with pytest.raises(ValueError, match=r"\[mlx_lm\] expected attention after each update_and_fetch"):
        cache.update_and_fetch(normal(1, 5, 1), normal(1, 5, 2))


def test_layers_that_share_keys() -> None:
    for n in (1, 30):
        cache = filled([150])[0]
        other = copy.deepcopy(cache)
        want = step(other, n, 4)
        assert same(step(cache, n, 4), want)
        again = base.scaled_dot_product_attention(
            normal(1, n, 12, 4), *cache.keys_and_values(), cache=cache, scale=0.125, mask="causal" if n > 1 else None
        )
        assert same(again, want)
        assert cache.offset == 150 + n


@pytest.mark.parametrize(("k_dim", "v_dim"), [(48, 48), (72, 72), (160, 160), (192, 128), (64, 128)])
def test_other_widths_are_filled_up_and_counted(k_dim: int, v_dim: int) -> None:
    """Keys and values of widths that the format has not: the same as the oracle's codes of the filled-up ones."""
    rng, spec = np.random.default_rng(3), SPEC
    q, k, v = (mx.array(rng.standard_normal((1, h, 100, d)), dtype=mx.float32)
               for h, d in ((4, k_dim), (2, k_dim), (2, v_dim)))  # fmt: skip
    cache, scale = PackedKVCache(spec), k_dim**-0.5
    for first, last in ((0, 90), (90, 99), (99, 100)):
        piece = (x[:, :, first:last] for x in (q, k, v))
        mask = cache.make_mask(last - first)
        q1, k1, v1 = piece
        keys, values = cache.update_and_fetch(k1, v1)
        out = base.scaled_dot_product_attention(q1, keys, values, cache=cache, scale=scale, mask=mask)
        assert out.shape == (1, 4, last - first, v_dim)
    assert cache.cache is not None
    width = cache.cache.codec.head_dim
    assert width >= max(k_dim, v_dim)
    at = slice(spec.sinks, spec.sinks + 64)
    k[0, :, at], v[0, :, at] = coded(Codec(spec, width, 2), k[0, :, at], v[0, :, at])
    want = mx.fast.scaled_dot_product_attention(q[:, :, -1:], k, v, scale=scale)
    assert float(mx.abs(out - want).max()) <= 2 * MLX_CPU["float32"] * float(mx.abs(want).max())
    assert cache.nbytes >= 2 * spec.page_format(width).record_bytes


def test_a_sparse_cache_says_from_when_on_it_is_sparse(caplog: pytest.LogCaptureFixture) -> None:
    made = model()
    make_prompt_cache(made, SPEC, fitted=False, sparse=SparseSpec(top_k=64, min_context=640))
    assert [r.message for r in caplog.records] == [
        "rows are read whole until they have 640 packed tokens (SparseSpec.min_context)"
    ]
    caplog.clear()
    make_prompt_cache(made, SPEC, fitted=False, sparse=SparseSpec(top_k=64, min_context=0))
    assert not caplog.records
