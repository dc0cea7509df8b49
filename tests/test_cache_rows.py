"""A row of a batch, by the native kernels: bit for bit the sequence alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from forgeattention import CodecSpec
from forgeattention.cache import LayerCache, TorchArrays
from forgeattention.codec import Codec

CODEC = Codec(CodecSpec(sinks=4, window=40), 64, 2)
LENGTHS = [3, 700, 64, 411, 1900]


def random(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 3])
def test_a_row_alone_is_bit_identical(dtype: torch.dtype, n: int) -> None:
    rows, width = len(LENGTHS), max(LENGTHS)
    k, v = (random(rows, 2, width, 64, seed=s, dtype=dtype) for s in (1, 2))
    keep = np.arange(width) >= width - np.array(LENGTHS)[:, None]
    name = str(dtype).removeprefix("torch.")
    batch = LayerCache(CODEC, rows, TorchArrays(), name)
    batch.append(k, v, keep)
    alone: list[Any] = [LayerCache(CODEC, 1, TorchArrays(), name) for _ in LENGTHS]
    for row, length in enumerate(LENGTHS):
        alone[row].append(k[row : row + 1, :, width - length :], v[row : row + 1, :, width - length :])
    for step in range(70):
        k, v = (random(rows, 2, n, 64, seed=s + step, dtype=dtype) for s in (100, 300))
        batch.append(k, v)
        for row in range(rows):
            alone[row].append(k[row : row + 1], v[row : row + 1])
        if step % 5:
            continue
        q = random(rows, 6, n, 64, seed=500 + step, dtype=dtype)
        out, lse = batch.attend(q, 0.125)
        for row in range(rows):
            own, own_lse = alone[row].attend(q[row : row + 1], 0.125)
            assert torch.equal(out[row], own[0])
            assert torch.equal(lse[row], own_lse[0])
    assert batch.packed_lengths.min() == (128 if n == 3 else 0)


def test_the_order_of_appends_does_not_matter() -> None:
    k, v = (random(1, 2, 900, 64, seed=s, dtype=torch.float32) for s in (1, 2))
    whole, parts = (LayerCache(CODEC, 1, TorchArrays()) for _ in range(2))
    whole.append(k, v)
    for at in range(0, 900, 9):
        parts.append(k[:, :, at : at + 9], v[:, :, at : at + 9])
    for a, b in zip(whole.row_pages(0).tolist(), parts.row_pages(0).tolist(), strict=True):
        assert torch.equal(whole.pool.page(a), parts.pool.page(b))
    q = random(1, 6, 1, 64, seed=3, dtype=torch.float32)
    assert torch.equal(whole.attend(q, 0.125)[0], parts.attend(q, 0.125)[0])
