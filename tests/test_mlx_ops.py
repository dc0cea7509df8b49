"""Ops on MLX arrays in host memory, against the oracle; caches of MLX arrays against caches of NumPy arrays."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

from cache_model import contents  # noqa: E402
from tolerances import MLX_CPU  # noqa: E402

from forgeattention import ops  # noqa: E402
from forgeattention.cache import LayerCache, MLXArrays, NumpyArrays, PagePool, arrays_of  # noqa: E402
from forgeattention.codec import Codec, CodecSpec  # noqa: E402
from forgeattention.ops import ExactTokens, PageTable, registry  # noqa: E402

DTYPES = ("float32", "float16", "bfloat16")
SPEC = CodecSpec(k_bits=3, v_bits=2, k_code="scalar", refine=False, sinks=2, window=5)
LENGTHS = [130, 64]


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> Any:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(getattr(mx, dtype))


def host(x: Any) -> Any:
    return np.array(x.astype(mx.float32))


def close(found: Any, wanted: Any, dtype: str) -> bool:
    error = np.abs(host(found) - wanted)
    return bool(error.max() <= MLX_CPU[dtype] * np.abs(wanted).max())


@pytest.fixture(scope="module")
def codec() -> Codec:
    mu = np.random.default_rng(7).standard_normal((2, 64))
    return Codec(SPEC, 64, 2, k_mu=mu, v_mu=mu)


@pytest.fixture(scope="module")
def pages(codec: Codec) -> Any:
    """Five pages in an order of their own, encoded by the oracle, and a ragged table of two rows."""
    base = np.zeros(5 * codec.page_bytes, np.uint8)
    order = np.array([3, 0, 4, 1, 2]) * codec.page_bytes
    k, v = host(normal(2, 320, 64)), host(normal(2, 320, 64, seed=1))
    ops.encode(k, v, codec, base, order, backend="reference")
    offsets = np.stack([order[:3], [order[3], -1, -1]])
    return PageTable(base, offsets, np.array(LENGTHS, np.int32), max(LENGTHS))


def in_mlx(table: PageTable) -> PageTable:
    return PageTable(mx.array(table.base), mx.array(table.page_table), mx.array(table.lengths), table.max_length)


@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_writes_the_array_in_place(codec: Codec, dtype: str) -> None:
    k, v = (normal(2, 128, 2, 64, seed=s, dtype=dtype)[1].swapaxes(0, 1) for s in (1, 2))
    out, want = mx.zeros((3 * codec.page_bytes,), dtype=mx.uint8), np.zeros(3 * codec.page_bytes, np.uint8)
    alias = np.array(out, copy=False)
    at = np.array([2, 0]) * codec.page_bytes
    ops.encode(k, v, codec, out, mx.array(at))
    ops.encode(host(k), host(v), codec, want, at, backend="reference")
    assert (alias == np.array(out)).all()
    assert not alias[codec.page_bytes : 2 * codec.page_bytes].any()
    assert (alias != want).mean() <= MLX_CPU["differing_bytes"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_pages(codec: Codec, pages: PageTable, dtype: str) -> None:
    found = ops.decode_pages(codec, in_mlx(pages), dtype=getattr(mx, dtype))
    wanted = ops.decode_pages(codec, pages, backend="reference")
    for x, want in zip(found, wanted):
        assert x.dtype == getattr(mx, dtype)
        assert close(x, want, dtype)
        assert not host(x)[1, :, 64:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3])
def test_decode_attention(codec: Codec, pages: PageTable, dtype: str, n: int) -> None:
    q = normal(2, n, 4, 64, seed=3, dtype=dtype).swapaxes(1, 2)
    k, v = (normal(2, 2, 9, 64, seed=s, dtype=dtype) for s in (4, 5))
    lengths, sinks = mx.array([9, 6], dtype=mx.int32), normal(4, seed=6)
    out, lse = ops.decode_attention(
        q, codec, in_mlx(pages), ExactTokens(k, v, lengths, 9), 0.125, causal=n > 1, sink_logits=sinks
    )
    exact = ExactTokens(host(k), host(v), np.array(lengths), 9)
    want, want_lse = ops.decode_attention(
        host(q), codec, pages, exact, 0.125, causal=n > 1, sink_logits=np.array(sinks), backend="reference"
    )
    assert out.dtype == q.dtype
    assert lse.dtype == mx.float32
    assert close(out, want, dtype)
    assert close(lse, want_lse, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_attention_and_merge(codec: Codec, pages: PageTable, dtype: str) -> None:
    q = normal(2, 4, 70, 64, seed=3, dtype=dtype)
    found = ops.prefill_attention(q, codec, in_mlx(pages), 0.125)
    wanted = ops.prefill_attention(host(q), codec, pages, 0.125, backend="reference")
    assert all(close(x, want, "float32") for x, want in zip(found, wanted))
    twice = ops.merge(*found, *found)
    assert close(twice[0], wanted[0], "float32")
    assert close(twice[1], wanted[1] + np.log(2), "float32")


def test_scores_and_sums(codec: Codec, pages: PageTable) -> None:
    q = normal(2, 4, 2, 64, seed=3)
    scores = ops.qk_scores(q, codec, in_mlx(pages), 0.125)
    want = ops.qk_scores(np.array(q), codec, pages, 0.125, backend="reference")
    finite = np.isfinite(want)
    assert (np.isfinite(np.array(scores)) == finite).all()
    assert close(mx.array(np.where(finite, np.array(scores), 0)), np.where(finite, want, 0), "float32")
    p = normal(2, 4, 2, 130, seed=8)
    wanted = ops.value_sum(np.array(p), codec, pages, backend="reference")
    assert close(ops.value_sum(p, codec, in_mlx(pages)), wanted, "float32")


def test_arrays_go_to_the_default_device() -> None:
    assert registry.native("mlx") == "cpu"
    assert registry.launch("encode", mx.zeros((1,))).__module__ == "forgeattention.backends.cpu.mlx"


def test_a_named_backend_that_cannot_run_raises(codec: Codec) -> None:
    k = mx.zeros((2, 64, 64))
    out = mx.zeros((codec.page_bytes,), dtype=mx.uint8)
    for name in ("metal", "cuda"):
        with pytest.raises(ValueError, match=rf"\[encode\] expected backend '{name}' to be available; got"):
            ops.encode(k, k, codec, out, mx.array(np.zeros(1, np.int64)), backend=name)
    assert not np.array(out).any()


def test_nan_is_refused_before_anything_is_written(codec: Codec) -> None:
    k = normal(2, 64, 64)
    bad = mx.where(mx.arange(64) == 3, mx.nan, k)
    out = mx.zeros((codec.page_bytes,), dtype=mx.uint8)
    with pytest.raises(ValueError, match=r"\[encode\] expected finite"):
        ops.encode(k, bad, codec, out, mx.array(np.zeros(1, np.int64)))
    assert not np.array(out).any()


def test_a_pool_is_one_array_that_grows() -> None:
    pool = PagePool(16, MLXArrays(), max_pages=40)
    assert pool.base is None
    ids = pool.alloc(3)
    for i, page in enumerate(ids.tolist()):
        pool.write(page, mx.full((16,), i + 1, dtype=mx.uint8))
    more = pool.alloc(30)
    pool.write(int(more[-1]), np.full(16, 9, np.uint8))
    assert sorted(pool.addresses(np.append(ids, more)).tolist()) == list(range(0, 33 * 16, 16))
    assert [int(pool.page(page)[7]) for page in (*ids.tolist(), int(more[-1]))] == [1, 2, 3, 9]
    assert pool.nbytes == pool.base.size < 40 * 16
    with pytest.raises(ValueError, match=r"\[page_pool\]"):
        pool.alloc(8)
    pool.free(ids)
    assert pool.base is not None
    pool.free(more)
    assert (pool.base, pool.nbytes) == (None, 0)


def test_a_fork_reads_its_pages_after_the_other_made_the_memory_grow() -> None:
    plain = Codec(SPEC, 64, 2)
    cache = LayerCache(plain, 1, MLXArrays())
    cache.append(normal(1, 2, 100, 64), normal(1, 2, 100, 64, seed=1))
    fork, q = cache.fork(), normal(1, 4, 1, 64, seed=2)
    before = np.array(fork.attend(q, 0.125)[0])
    cache.append(normal(1, 2, 2000, 64, seed=3), normal(1, 2, 2000, 64, seed=4))
    assert (np.array(fork.attend(q, 0.125)[0]) == before).all()
    assert fork.table is not None
    assert fork.table.base is cache.pool.base


def test_arrays_of() -> None:
    made = arrays_of(mx.zeros((1,)))
    assert isinstance(made, MLXArrays)
    assert made.on_host
    assert not made.addressable
    half = mx.array([1.5, -2.0], dtype=mx.bfloat16)
    assert made.to_host(half).tolist() == [0x3FC0, 0xC000]
    target = mx.zeros((3,), dtype=mx.bfloat16)
    made.assign(target, made.to_host(half), slice(1, 3))
    assert target.tolist() == [0, 1.5, -2]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 150)),
        st.tuples(st.just("trim"), st.integers(1, 90)),
        st.tuples(st.just("select"), st.permutations([0, 1, 1])),
        st.tuples(st.just("join"), st.just(0)),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None)
@given(STEPS, st.booleans())
def test_a_cache_holds_what_one_of_numpy_arrays_holds(steps: Any, padded: bool) -> None:
    plain = Codec(SPEC, 64, 1)
    ours, theirs = LayerCache(plain, 2, MLXArrays()), LayerCache(plain, 2, NumpyArrays())
    for i, (what, value) in enumerate(steps):
        if what == "append":
            rng = np.random.default_rng(i)
            k, v = (rng.standard_normal((theirs.batch, 1, value, 64)).astype(np.float32) for _ in range(2))
            keep = rng.random((theirs.batch, value)) < 0.7 if padded else None
            theirs.append(k, v, keep)
            ours.append(mx.array(k), mx.array(v), keep)
        elif what == "trim":
            drop = np.minimum(theirs.lengths, value)
            theirs.trim(drop)
            ours.trim(drop)
        elif what == "select":
            theirs.select(value[:2])
            ours.select(value[:2])
        elif theirs.batch < 4:
            theirs.join(theirs.fork([0]))
            ours.join(ours.fork([0]))
    assert ours.packed_lengths.tolist() == theirs.packed_lengths.tolist()
    for row in range(theirs.batch):
        for found, wanted in zip(contents(ours, row), contents(theirs, row), strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_mlx_is_not_imported_for_other_arrays() -> None:
    import subprocess

    code = "import sys, numpy, forgeattention.ops, forgeattention.cache; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def reading(cache, sparse):
    """The same tokens in a cache that reads them by other rules."""
    out = LayerCache(cache.codec, 0, cache.arrays, cache.dtype, pool=cache.pool, sparse=sparse)
    out.join(cache)
    return out


def test_sparse_steps():
    """All tokens kept is dense attention; of some, NumPy's arrays give the same, statistics too."""
    from forgeattention.sparse import SparseLayer, SparseSpec

    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 2, 2, 900, 64)).astype(np.float32)
    q = rng.normal(size=(2, 6, 1, 64)).astype(np.float32)
    codec, found = Codec(CodecSpec(), 64, 2), {}
    for name, wrap in (("numpy", lambda x: x), ("mlx", mx.array)):
        cache = LayerCache.like(wrap(k), codec)
        cache.append(wrap(k), wrap(v))
        dense = np.array(cache.attend(wrap(q), 0.125)[0])
        for everything in (SparseSpec(top_k=9999, min_context=0), SparseSpec(top_k=6400, fast=True, min_context=0)):
            cache = reading(cache, SparseLayer(everything))
            out = np.array(cache.attend(wrap(q), 0.125)[0])
            assert np.abs(out - dense).max() < MLX_CPU["float32"] * np.abs(dense).max()
        found[name] = []
        for spec in (SparseSpec(top_k=30, min_context=0), SparseSpec(top_p=0.9, fast=True, min_context=0)):
            cache = reading(cache, SparseLayer(spec, log=[]))
            out = np.array(cache.attend(wrap(q), 0.125)[0])
            found[name].append((out, cache.sparse.log[0]))
    for (a, said), (b, also) in zip(found["numpy"], found["mlx"], strict=True):
        assert np.abs(a - b).max() < MLX_CPU["float32"] * np.abs(a).max()
        assert said == pytest.approx(also, abs=1e-5)
