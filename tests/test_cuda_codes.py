"""kernels/cuda/codes.cuh, compiled for the CPU: CUDA's way from words to level indices gives what the format says."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from forgeattention.backends.cuda.nvrtc import KERNELS
from forgeattention.codec import packing
from forgeattention.codec.codebook import trellis_levels

SOURCE = """
#include "cuda/codes.cuh"
extern "C" void indices(const forge_u32* words, forge_u32* out, int units) {
  for (int i = 0; i < units; ++i) {
    forge_u32 w[TEST_BITS], n[4];
    for (int k = 0; k < TEST_BITS; ++k) w[k] = words[i * TEST_BITS + k];
    forge::unit_indices<TEST_BITS, TEST_CODE>(w, n);
    for (int k = 0; k < 4; ++k) out[4 * i + k] = n[k];
  }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize(("bits", "states"), [(2, 1), (3, 1), (4, 1), (2, 4), (2, 8), (3, 4), (3, 8)])
def test_indices(bits: int, states: int, tmp_path: Path) -> None:
    library, source = tmp_path / "codes.so", tmp_path / "codes.cpp"
    source.write_text(SOURCE)
    code = {1: 0, 4: 1, 8: 2}[states]
    flags = [f"-DTEST_BITS={bits}", f"-DTEST_CODE={code}", f"-I{KERNELS}", "-std=c++17", "-O1", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, "-o", library, source], check=True)
    codes = np.random.default_rng(bits + states).integers(0, 1 << bits, (400, 32)).astype(np.uint8)
    words = np.ascontiguousarray(packing.pack_unit(codes, bits, states > 1))
    out = np.empty((400, 4), np.uint32)
    ctypes.CDLL(str(library)).indices(
        words.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int(400)
    )
    got = out[:, None, :] >> np.arange(0, 32, 4, dtype=np.uint32)[:, None] & 15
    assert np.array_equal(got.reshape(400, 32), codes if states == 1 else trellis_levels(codes, bits, states))
