"""compact: pages moved byte for byte, on every backend that runs here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgeattention import ops, reference
from forgeattention.backends.cuda import nvrtc

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not nvrtc.available()[0], reason=nvrtc.available()[1]))


@settings(max_examples=60, deadline=None)
@given(
    words=st.integers(1, 700), picks=st.lists(st.integers(0, 9), max_size=12), absolute=st.booleans(),
    backend=st.sampled_from(["cpu", "reference"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_pages_are_copied_bit_for_bit(words, picks, absolute, backend, seed):
    size = 16 * words
    base = np.random.default_rng(seed).integers(0, 256, 10 * size + 48, np.uint8)
    at = np.array(picks, np.int64) * size + 32
    out = ops.compact(None if absolute else base, at + base.ctypes.data if absolute else at, size, backend=backend)
    assert out.shape == (len(picks), size)
    np.testing.assert_array_equal(out, reference.compact(base, at, size))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("words", [1, 255, 1024, 1025, 5000])
@pytest.mark.parametrize("absolute", [False, True])
def test_torch_tensors(device, words, absolute):
    size = 16 * words
    base = torch.randint(0, 256, (7 * size + 16,), dtype=torch.uint8, device=device)
    at = torch.tensor([4, 0, 6, 6], device=device) * size + 16
    out = ops.compact(None if absolute else base, at + base.data_ptr() if absolute else at, size)
    assert out.device == base.device
    wanted = reference.compact(base.cpu().numpy(), at.cpu().numpy(), size)
    np.testing.assert_array_equal(out.cpu().numpy(), wanted)
    assert ops.compact(base, at[:0], size).shape == (0, size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_bytes": 24}, r"expected page_bytes a positive multiple of 16; got 24"),
        ({"page_bytes": 0}, r"expected page_bytes a positive multiple of 16; got 0"),
        ({"offsets": np.zeros((1, 1), np.int64)}, r"expected offsets int64 \[pages\]; got int64 \[1, 1\]"),
        ({"offsets": np.zeros(1, np.int32)}, r"expected offsets int64"),
        ({"base": np.zeros(64, np.int8)}, r"expected base uint8; got int8 \[64\]"),
        ({"offsets": np.array([48])}, r"expected pages within 64 bytes; got 48"),
        ({"offsets": np.array([-16])}, r"expected pages within 64 bytes; got -16"),
    ],
)
def test_errors(change, message):
    args = {"base": np.zeros(64, np.uint8), "offsets": np.zeros(1, np.int64), "page_bytes": 32} | change
    with pytest.raises(ValueError, match=r"\[compact\] " + message):
        ops.compact(**args)
