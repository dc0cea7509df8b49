"""kernels/cuda/encode.cu, compiled for the CPU and run by 256 threads: its pages lose no more than the oracle's."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tolerances

from forgeattention import reference
from forgeattention.backends.cuda import plans
from forgeattention.backends.cuda.nvrtc import KERNELS
from forgeattention.backends.cuda.params import STRUCTS
from forgeattention.codec import Codec, CodecSpec, packing

RUN = """
alignas(16) static u8 shared[232448];
#include "encode.inc"
extern "C" int run(const float* k, const float* v, u8* record, float k_unit, float v_unit, i64 offset) {
  Block made;
  block = &made;
  int bad = 0;
  Params p{};
  p.k = k, p.v = v, p.base = record, p.offsets = &offset, p.bad = &bad;
  p.k_stride[2] = p.v_stride[2] = HEAD_DIM, p.k_unit = k_unit, p.v_unit = v_unit;
  std::vector<std::thread> threads;
  for (int i = 0; i < 256; ++i) threads.emplace_back([&p, i] { threadIdx = {i, 0, 0}, encode(p); });
  for (std::thread& thread : threads) thread.join();
  return bad;
}
"""
CASES: list[dict[str, Any]] = [
    {"head_dim": 64, "k_code": "scalar", "scales": "fp16"},
    {"head_dim": 128},
    {"head_dim": 96, "v_code": "trellis4"},
    {"head_dim": 64, "k_bits": 2, "v_bits": 2, "k_code": "trellis4", "v_code": "trellis8"},
]


def compiled(codec: Codec, folder: Path) -> Any:
    """The kernel as a function of the host."""
    text = (KERNELS / "cuda" / "encode.cu").read_text()
    (folder / "params.inc").write_text(STRUCTS["encode"].text)
    text = re.sub(r'#include "[^"]*"|#pragma unroll.*|extern __shared__ .*', "", text)
    (folder / "encode.inc").write_text(text)
    (folder / "encode.cpp").write_text('#include "device.h"\n' + RUN)
    macros = [f"-D{name}={value}" for name, value in plans.encode_macros(codec, "float32")]
    includes = [f"-I{path}" for path in (folder, KERNELS, Path(__file__).parent / "cuda_host")]
    flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", *includes, *macros]
    subprocess.run(["g++", *flags, "-o", folder / "encode.so", folder / "encode.cpp"], check=True)
    return ctypes.CDLL(str(folder / "encode.so")).run


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_pages(case: dict[str, Any], tmp_path: Path) -> None:
    choices = dict(case)
    dim = choices.pop("head_dim")
    codec = Codec(CodecSpec(rotation="none", refine=False, **choices), dim, 1)
    run = compiled(codec, tmp_path)
    rng = np.random.default_rng(3)
    k, v = (rng.standard_normal((2, 64, dim)) * np.exp(0.4 * rng.standard_normal((2, 64, 1)))).astype(np.float32)
    k += 3 * rng.standard_normal(dim).astype(np.float32)
    v[5] = 0
    record = np.zeros(codec.page_bytes, np.uint8)
    units = [ctypes.c_float(book.unit) for book in (codec.k_codebook, codec.v_codebook)]
    assert run(*(x.ctypes.data_as(ctypes.c_void_p) for x in (k, v, record)), *units, ctypes.c_int64(-1)) == 0
    assert not record.any()
    assert run(*(x.ctypes.data_as(ctypes.c_void_p) for x in (k, v, record)), *units, ctypes.c_int64(0)) == 0
    best = reference.encode(k[None].astype(np.float64), v[None].astype(np.float64), codec)
    for mine, oracle, x in zip(*(reference.decode_pages(p, codec) for p in (record[None, None], best)), (k, v)):
        loss, least = ((mine[0] - x) ** 2).sum(), ((oracle[0] - x) ** 2).sum()
        assert loss < least * (1 + tolerances.CUDA_ENCODE_LOSS)
    for side in "kv":
        if getattr(codec.format, f"{side}_code") == "scalar":
            parts = [packing.split_record(page.reshape(-1), codec.format)[side] for page in (record, best)]
            assert np.array_equal(*parts)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_values_that_are_not_finite_set_the_flag(tmp_path: Path) -> None:
    codec = Codec(CodecSpec(rotation="none", refine=False, k_code="scalar"), 64, 1)
    run = compiled(codec, tmp_path)
    for side in range(2):
        x = np.ones((2, 64, 64), np.float32)
        x[side, 9, 5] = np.nan
        record = np.zeros(codec.page_bytes, np.uint8)
        assert (
            run(
                *(a.ctypes.data_as(ctypes.c_void_p) for a in (*x, record)),
                ctypes.c_float(1),
                ctypes.c_float(1),
                ctypes.c_int64(0),
            )
            == 1
        )
