"""Inputs for the kernel tests: random page records, page tables with stale memory, and the emulated device."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forgeattention.backends.metal.launch import Launch, kernel_text
from forgeattention.codec import packing
from forgeattention.codec.codec import Codec
from forgeattention.codec.spec import PAGE, CodecSpec
from forgeattention.ops.table import ExactTokens, PageTable

from .emulator import BFloat16, run_kernel

# (k_bits, k_code, v_bits, v_code, scales): every code on either side, with both kinds of scales.
FORMATS = [
    (3, "scalar", 3, "scalar", "fp16"),
    (3, "trellis4", 2, "trellis8", "log8"),
    (2, "trellis4", 4, "scalar", "log8"),
    (4, "scalar", 2, "scalar", "fp16"),
    (2, "scalar", 3, "trellis8", "log8"),
    (3, "trellis8", 2, "trellis4", "fp16"),
    (2, "trellis8", 3, "trellis4", "log8"),
]
HEAD_DIMS = (64, 80, 96, 128, 256, 512)
# Every format once and every head_dim twice.
CASES = [(f, 64) for f in FORMATS] + [(f, d) for f in FORMATS[:2] for d in HEAD_DIMS[1:]]


class Emulator:
    """A device for backends.metal: NumPy arrays and the emulator. Remembers the last launch and what it read."""

    xp = np

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.bytes_read: dict[str, int] = {}

    def run(self, launch: Launch) -> list[Any]:
        self.launches.append(launch)
        header, body = kernel_text(launch.kernel)
        return run_kernel(
            launch.kernel,
            body,
            launch.inputs,
            launch.outputs,
            launch.grid,
            launch.threads,
            launch.template,
            header,
            bytes_read=self.bytes_read,
        )


def make_codec(fmt: tuple = FORMATS[0], head_dim: int = 64, kv_heads: int = 2, **kwargs: Any) -> Codec:
    """A codec; the plain ones are made once, since inverting a large rotation takes its time."""
    return (
        _make_codec(fmt, head_dim, kv_heads)
        if not kwargs
        else _make_codec.__wrapped__(fmt, head_dim, kv_heads, **kwargs)
    )


@cache
def _make_codec(fmt: tuple, head_dim: int, kv_heads: int, **kwargs: Any) -> Codec:
    k_bits, k_code, v_bits, v_code, scales = fmt
    spec = CodecSpec(k_bits=k_bits, k_code=k_code, v_bits=v_bits, v_code=v_code, scales=scales, refine=False)
    return Codec(spec, head_dim, kv_heads, **kwargs)


def random_record(rng: np.random.Generator, codec: Codec, with_mean: bool = True) -> NDArray[np.uint8]:
    """A record of random codes. Scales and means are of the size that unit vectors give."""
    fmt = codec.format
    record = rng.integers(0, 256, fmt.record_bytes, np.uint8)
    part = packing.split_record(record, fmt)
    bases = [int(b) for b in rng.integers(-8, -5, 2)]
    mean = rng.uniform(-120, 120, fmt.padded_dim) if with_mean else np.zeros(fmt.padded_dim)
    part["mean"][:] = packing.pack_header(mean, 0.01 if with_mean else 0.0, *bases)
    for name in ("k_scales", "v_scales"):
        scales = rng.uniform(0.3, 1.5, PAGE) * (rng.random(PAGE) > 0.05)
        part[name][:] = scales if fmt.scales == "fp16" else packing.log8_encode(scales, bases[name == "v_scales"])
    return record


def make_table(rng: np.random.Generator, codec: Codec, lengths: list[int], spare: int = 1) -> PageTable:
    """A table over a pool whose pages lie in random order. What must not matter is poisoned: unused pages, entries past
    a row's last page, and the scales of tokens past its length (NaN where the format has one)."""
    counts = [-(-n // PAGE) for n in lengths]
    width = max([*counts, 1]) + spare
    pool = rng.integers(0, 256, (sum(counts) + 2, codec.kv_heads, codec.format.record_bytes), np.uint8)
    slots = rng.permutation(len(pool))[: sum(counts)]
    offsets = np.full((len(lengths), width), -(2**40), np.int64)
    used = 0
    for row, count in enumerate(counts):
        for page in range(count):
            offsets[row, page] = slots[used] * codec.page_bytes
            for head in range(codec.kv_heads):
                record = random_record(rng, codec, with_mean=(page + head) % 3 != 1)
                part = packing.split_record(record, codec.format)
                for name in ("k_scales", "v_scales"):
                    part[name][max(lengths[row] - page * PAGE, 0) :] = np.nan if codec.format.scales == "fp16" else 255
                pool[slots[used], head] = record
            used += 1
    return PageTable(pool.reshape(-1), offsets, np.array(lengths, np.int32), max(lengths, default=0))


def make_exact(
    rng: np.random.Generator, codec: Codec, lengths: list[int], capacity: int, dtype: str = "float32"
) -> tuple[ExactTokens, ExactTokens]:
    """Exact tokens in `dtype` with NaN past each row's length, and the same in float32 for the oracle."""
    k, v = rng.standard_normal((2, len(lengths), codec.kv_heads, capacity, codec.head_dim)).astype(np.float32)
    for row, n in enumerate(lengths):
        k[row, :, n:] = v[row, :, n:] = np.nan
    counts, top = np.array(lengths, np.int32), max(lengths, default=0)
    if dtype == "bfloat16":
        k, v = BFloat16.rounded(k), BFloat16.rounded(v)
        return ExactTokens(k, v, counts, top), ExactTokens(k.float32(), v.float32(), counts, top)
    k, v = k.astype(dtype), v.astype(dtype)
    return ExactTokens(k, v, counts, top), ExactTokens(k.astype(np.float32), v.astype(np.float32), counts, top)


def queries(rng: np.random.Generator, codec: Codec, batch: int, group: int, n: int, dtype: str = "float32") -> NDArray:
    return rng.standard_normal((batch, codec.kv_heads * group, n, codec.head_dim)).astype(dtype)


def relative_error(got: NDArray, expected: NDArray) -> float:
    """Largest error over the largest expected magnitude; infinities must agree."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    finite = np.isfinite(expected)
    assert (got[~finite] == expected[~finite]).all()
    assert np.isfinite(got[finite]).all()
    if not finite.any():
        return 0.0
    return float(np.abs(got[finite] - expected[finite]).max() / max(np.abs(expected[finite]).max(), 1e-30))
