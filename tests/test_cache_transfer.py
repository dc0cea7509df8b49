"""Exported pages and rows: what comes back, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgeattention import CodecSpec
from forgeattention.cache import (
    LayerCache,
    NumpyArrays,
    PagePool,
    TorchArrays,
    export_pages,
    export_row,
    import_pages,
    import_row,
)
from forgeattention.codec import Codec
from tests.tolerances import CUDA_ATTENTION

SPEC = CodecSpec(k_bits=2, v_bits=3, sinks=3, window=10)
CODEC = Codec(SPEC, 64, 2)


def cache(tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> LayerCache:
    random = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(1, 2, tokens, 64, generator=random).to(device, dtype) for _ in range(2))
    made = LayerCache(CODEC, 1, TorchArrays(device), str(dtype).removeprefix("torch."))
    made.append(k, v)
    return made


def same(a: LayerCache, b: LayerCache) -> bool:
    (_, old), (_, new) = a.row(0), b.row(0)
    pages = [[np.array(c.arrays.to_host(c.pool.page(p))) for p in c.row_pages(0).tolist()] for c in (a, b)]
    held = slice(0, old.max_length)
    return (
        a.dtype == b.dtype
        and a.packed_lengths.tolist() == b.packed_lengths.tolist()
        and old.max_length == new.max_length
        and all((x == y).all() for x, y in zip(*pages, strict=True))
        and all(torch.equal(x[:, :, held].cpu(), y[:, :, held].cpu()) for x, y in ((old.k, new.k), (old.v, new.v)))
    )


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 300),
    drop=st.integers(0, 100),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_a_row_comes_back_bit_for_bit_and_goes_on(tokens: int, drop: int, dtype: torch.dtype) -> None:
    sent = cache(tokens, dtype)
    sent.trim(min(drop, tokens))
    got = import_row(export_row(sent), CODEC, TorchArrays())
    assert same(sent, got)
    more = cache(150, dtype, seed=1)
    k, v = (x[:, :, : more.exact.max_length] for x in (more.exact.k, more.exact.v))
    for layer in (sent, got):
        layer.append(k, v)
    assert same(sent, got)


def test_any_row_of_a_batch_and_into_a_shared_pool() -> None:
    batch, other = cache(200), cache(90, seed=2)
    batch.join(other)
    pool = PagePool(CODEC.page_bytes, TorchArrays())
    rows = [import_row(export_row(batch, row), CODEC, TorchArrays(), pool=pool) for row in range(2)]
    assert same(rows[0], cache(200))
    assert same(rows[1], other)
    assert pool.in_use == batch.pool.in_use == 3
    rows[0].join(rows[1])
    assert rows[0].lengths.tolist() == [200, 90]
    assert pool.in_use == 3
    del rows
    assert pool.in_use == 0


def test_pages_alone_travel_between_frameworks() -> None:
    layer = cache(300)
    ids = layer.row_pages(0)[1:3]
    pool = PagePool(CODEC.page_bytes, NumpyArrays(), max_pages=3)
    data = export_pages(CODEC, layer.pool, ids)
    new = import_pages(data, CODEC, pool)
    for old, page in zip(ids.tolist(), new.tolist(), strict=True):
        assert (np.asarray(layer.pool.page(old)) == pool.page(page)).all()
    assert export_pages(CODEC, pool, new) == data
    with pytest.raises(ValueError, match="expected at most 3 pages"):
        import_pages(data, CODEC, pool)
    assert pool.in_use == 2


def test_every_flipped_byte_is_found() -> None:
    data = bytearray(export_row(cache(75)))
    pool = PagePool(CODEC.page_bytes, TorchArrays())
    for at in [*range(64), *range(64, len(data), 997), len(data) - 1]:
        data[at] ^= 1
        with pytest.raises(ValueError, match=r"\[cache.import\] expected (undamaged|exported)"):
            import_row(bytes(data), CODEC, TorchArrays(), pool=pool)
        data[at] ^= 1
    for cut in (0, 7, 60, 200, len(data) - 1):
        with pytest.raises(ValueError, match=r"\[cache.import\] expected"):
            import_row(bytes(data[:cut]), CODEC, TorchArrays(), pool=pool)
    assert pool.in_use == 0
    assert same(import_row(memoryview(data), CODEC, TorchArrays(), pool=pool), cache(75))


def test_another_codec_or_row_is_refused() -> None:
    data = export_row(cache(200))
    other = Codec(dataclasses.replace(SPEC, seed=2), 64, 2)
    with pytest.raises(ValueError, match="expected codec"):
        import_row(data, other, TorchArrays())
    with pytest.raises(ValueError, match="expected codec"):
        import_row(data, Codec(SPEC, 64, 1), TorchArrays())
    with pytest.raises(ValueError, match="a row in"):
        export_row(cache(10), 1)
    with pytest.raises(ValueError, match="expected a pool of"):
        import_pages(data, CODEC, PagePool(1, TorchArrays()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_between_cpu_and_cuda() -> None:
    sent = cache(300)
    there = import_row(export_row(sent), CODEC, TorchArrays("cuda"))
    assert same(sent, there)
    assert export_row(there) == export_row(sent)
    q = torch.randn(1, 4, 1, 64)
    ours, theirs = (layer.attend(q.to(layer.exact.k.device), 0.125)[0].cpu() for layer in (sent, there))
    assert torch.allclose(ours, theirs, atol=CUDA_ATTENTION["float32"])
