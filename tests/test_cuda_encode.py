"""kernels/cuda/encode.cu, compiled for the CPU and run by 256 threads that take turns: its pages lose hardly more than
the oracle's."""

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
from forgeattention.backends.cuda.encoder import encode_plan, feedback_words
from forgeattention.backends.cuda.nvrtc import KERNELS
from forgeattention.backends.cuda.params import STRUCTS
from forgeattention.codec import Codec, CodecSpec, packing
from forgeattention.codec.presets import PRESETS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

RUN = """
alignas(16) static u8 shared[232448];
#include "encode.inc"
extern "C" int run(const float* k, const float* v, u8* record, const u32* feedback, float k_unit, float v_unit,
                   i64 offset) {
  static Params p;
  int bad = 0;
  p = {};
  p.k = k, p.v = v, p.base = record, p.offsets = &offset, p.bad = &bad, p.feedback = feedback;
  p.k_stride[2] = p.v_stride[2] = HEAD_DIM, p.k_unit = k_unit, p.v_unit = v_unit;
  auto made = std::make_unique<Block>();
  block = made.get();
  block->run([] { encode(p); });
  return bad;
}
"""


class Kernel:
    """The kernel as a function of the host, for a codec of one head."""

    def __init__(self, codec: Codec, folder: Path) -> None:
        parts = [(KERNELS / "cuda" / name).read_text() for name in ("paths.cuh", "key_search.cuh", "encode.cu")]
        text = re.sub(r'#include "[^"]*"|#pragma.*|extern __shared__ .*', "", "\n".join(parts))
        (folder / "params.inc").write_text(STRUCTS["encode"].text)
        (folder / "encode.inc").write_text(text)
        (folder / "encode.cpp").write_text('#include "device.h"\n' + RUN)
        plan = encode_plan(codec)
        macros = [f"-D{name}={value}" for name, value in plan.macros(codec, "float32")]
        includes = [f"-I{path}" for path in (folder, KERNELS, Path(__file__).parent / "cuda_host")]
        flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", *includes, *macros]
        subprocess.run(["g++", *flags, "-o", folder / "encode.so", folder / "encode.cpp"], check=True)
        library = ctypes.CDLL(str(folder / "encode.so"))
        self._run, self.codec = library.run, codec
        self._feedback = None if codec.shaping is None else np.ascontiguousarray(feedback_words(codec)[0])

    def __call__(self, k: Any, v: Any, offset: int = 0) -> tuple[int, Any]:
        """Whether the page could not be coded, and its record."""
        record = np.zeros(self.codec.page_bytes, np.uint8)
        arrays = [None if x is None else x.ctypes.data_as(ctypes.c_void_p) for x in (k, v, record, self._feedback)]
        units = [ctypes.c_float(book.unit) for book in (self.codec.k_codebook, self.codec.v_codebook)]
        return self._run(*arrays, *units, ctypes.c_int64(offset)), record


def vectors(dim: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(3)
    k, v = (rng.standard_normal((2, 64, dim)) * np.exp(0.4 * rng.standard_normal((2, 64, 1)))).astype(np.float32)
    k += 3 * rng.standard_normal(dim).astype(np.float32)
    v[5] = 0
    return k, v


def gram(dim: int) -> Any:
    """Of queries that see some directions much more than others."""
    turned = np.linalg.qr(np.random.default_rng(5).standard_normal((dim, dim)))[0]
    return turned @ np.diag(1 / (1 + np.arange(dim))) @ turned.T


def losses(page: Any, codec: Codec, k: Any, v: Any) -> tuple[float, float]:
    """Squared errors over each vector's own size, of keys as queries of the codec's Gram matrix see them."""
    keys, values = (x[0] for x in reference.decode_pages(page.reshape(1, 1, -1), codec))
    z = keys - k
    weight: Any = 1.0
    if codec.shaping is not None:
        z, weight = z @ codec.shaping.factor[0, 0].astype(np.float64).T, codec.shaping.weight[0, 0]
    sizes = (((k - k.mean(0)) ** 2).sum(1), (v**2).sum(1))
    out = [(weight * z * z).sum(1), ((values - v) ** 2).sum(1)]
    return tuple(float((x / np.where(n > 0, n, 1)).sum()) for x, n in zip(out, sizes))  # type: ignore[return-value]


PLAIN: list[dict[str, Any]] = [
    {"head_dim": 64, "k_code": "scalar", "scales": "fp16"},
    {"head_dim": 128},
    {"head_dim": 96, "v_code": "trellis4"},
    {"head_dim": 64, "k_bits": 2, "v_bits": 2, "k_code": "trellis4", "v_code": "trellis8"},
]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: "-".join(map(str, case.values())))
def test_plain_pages(case: dict[str, Any], tmp_path: Path) -> None:
    choices = dict(case)
    dim = choices.pop("head_dim")
    codec = Codec(CodecSpec(rotation="none", refine=False, **choices), dim, 1)
    kernel = Kernel(codec, tmp_path)
    k, v = vectors(dim)
    assert not kernel(k, v, -1)[1].any()
    bad, record = kernel(k, v)
    assert bad == 0
    best = reference.encode(k[None].astype(np.float64), v[None].astype(np.float64), codec)
    for loss, least in zip(losses(record, codec, k, v), losses(best, codec, k, v)):
        assert loss < least * (1 + tolerances.CUDA_ENCODE_LOSS)
    for side in "kv":
        if getattr(codec.format, f"{side}_code") == "scalar":
            parts = [packing.split_record(page.reshape(-1), codec.format)[side] for page in (record, best)]
            assert np.array_equal(*parts)


@pytest.mark.parametrize("shaped", [True, False], ids=["shaped", "unshaped"])
@pytest.mark.parametrize(("preset", "dim"), [(p, d) for p in PRESETS for d in (64, 96, 128, 256)])
def test_pages_of_presets(preset: str, dim: int, shaped: bool, tmp_path: Path) -> None:
    """Refined and fed back: not the oracle's codes, which no two searches share, but hardly worse ones."""
    if not shaped and dim != 128:
        pytest.skip("one head_dim tells")
    spec = CodecSpec(**{**vars(PRESETS[preset]), "rotation": "none"})
    codec = Codec(spec, dim, 1, **({"query_gram": gram(dim), "gram_ridge": 0.4} if shaped else {}))
    k, v = vectors(dim)
    bad, record = Kernel(codec, tmp_path)(k, v)
    assert bad == 0
    best = reference.encode(k[None].astype(np.float64), v[None].astype(np.float64), codec)
    (keys, values), (least_keys, least_values) = losses(record, codec, k, v), losses(best, codec, k, v)
    print(preset, dim, shaped, keys / least_keys - 1, values / least_values - 1)
    assert keys < least_keys * (1 + tolerances.CUDA_REFINED_KEYS)
    assert values < least_values * (1 + tolerances.CUDA_REFINED_VALUES)


def test_values_that_are_not_finite_set_the_flag(tmp_path: Path) -> None:
    kernel = Kernel(Codec(CodecSpec(rotation="none", refine=False, k_code="scalar"), 64, 1), tmp_path)
    for side in range(2):
        x = np.ones((2, 64, 64), np.float32)
        x[side, 9, 5] = np.nan
        assert kernel(*x)[0] == 1
