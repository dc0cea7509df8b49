"""What launches of kernels/cuda/encode.cu are told of a codec: their shape, and keys' feedback as the kernel reads it.

Nothing here needs a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...codec.codec import Codec
from ...codec.packing import k_layout, key_orders
from ...codec.spec import PAGE, SCALE_RULES
from .macros import TYPES, page_macros
from .nvrtc import Macros
from .plans import Limits

THREADS = 256


@dataclass(frozen=True)
class Chains:
    """How a page's keys are cut into runs of units that begin and end with whole tokens (key_search.cuh)."""

    count: int
    tokens: int  # of a chain
    length: int  # codes of a chain

    @classmethod
    def of(cls, padded_dim: int) -> Chains:
        steps = padded_dim // 32
        run = steps // math.gcd(4, steps)
        return cls(8 * (padded_dim // 16) // run, 4 * run // steps, 128 * run)


@dataclass(frozen=True)
class EncodePlan:
    """Shape of an encode launch; a CTA codes one page of one KV head."""

    pairs: int  # of multiples of a key's norm that are tried
    warps: int  # that search keys
    shared_bytes: int

    def macros(self, codec: Codec, dtype: str) -> Macros:
        """The macros of encode.cu for vectors of a dtype."""
        spec = codec.spec
        return page_macros(
            codec,
            FORGE_TYPE=TYPES[dtype],
            FORGE_KEY_MEAN=int(spec.key_mean),
            FORGE_K_RULE=SCALE_RULES.index(spec.k_scale_rule),
            FORGE_V_RULE=SCALE_RULES.index(spec.v_scale_rule),
            FORGE_REFINE=int(spec.refine),
            FORGE_SHAPED=int(codec.shaping is not None),
            FORGE_PAIRS=self.pairs,
            FORGE_KEY_WARPS=self.warps,
            FORGE_SHARED_BYTES=self.shared_bytes,
        )


def encode_plan(codec: Codec, limits: Limits | None = None, pairs: int | None = None) -> EncodePlan:
    """The launch shape for a codec on a device.

    Args:
        codec: the layer's.
        limits: the device's; an H100's if None.
        pairs: of multiples that a refining codec tries for each key; by default as many as give a warp to each of a
            multiprocessor's four schedulers: four to head_dim 64, where 32 chains are one warp's, two beyond.

    Raises:
        ValueError: the device has too little shared memory.
    """
    room = (limits or Limits()).shared_per_block
    fmt, d = codec.format, codec.format.padded_dim
    chains, shaped = Chains.of(d), codec.shaping is not None
    pairs = pairs or (4 if chains.count == 32 else 2)
    searched = fmt.k_code != "scalar" or shaped
    fixed = 8 * 256 + 4 * (d + 3 * PAGE + THREADS // 32) + PAGE
    lines = min(d, THREADS) * 4 * 48 if fmt.v_code != "scalar" else 0
    area = 4 * 32 * 36 + 4096 + 2048 + 128 * 9 * chains.tokens
    area += 64 * 2 * (chains.length - 16) + 2 * 32 * 36 if shaped else 0
    numbers, y = 2 * chains.count * (chains.length + 16), 4 * PAGE * (d + 1)

    def needed(pairs: int, warps: int) -> int:
        search = warps * area + 2 * pairs * (chains.count * chains.length // 2 + 512)
        return fixed + max(y + PAGE * d + lines, numbers + max(search, y) if searched else 0)

    # Fewer warps before fewer multiples: the former only takes longer.
    tried = range(pairs if codec.spec.refine else 1, 0, -1)
    shapes = [(n, w) for n in tried for w in range(min(-(-chains.count // 32) * n, THREADS // 32), 0, -1)]
    for n, warps in shapes:
        if needed(n, warps) <= room:
            return EncodePlan(n, warps, needed(n, warps))
    least = needed(*shapes[-1])
    raise ValueError(f"[encode] expected {least} bytes of shared memory for head_dim {fmt.head_dim}; got {room}")


def feedback_words(codec: Codec) -> NDArray[np.uint32]:
    """A codec's shaping as key_search.cuh reads it, [heads, words], heads being 1 or kv_heads."""
    assert codec.shaping is not None
    d = codec.format.padded_dim
    chains = Chains.of(d)
    token, channel = k_layout(d)
    _, order = key_orders(d)
    run = chains.length // 128
    # Of the first chain: positions run over lanes 0..3, the run's units and their codes.
    token, channel = (x[:4, :run].reshape(-1) for x in (token, channel))
    own = order[token]
    same = token[:, None] == token
    factor = codec.shaping.factor[:, own[:, None], channel[:, None], channel] * same
    factor = np.tril(factor, -1) + np.eye(chains.length, dtype=np.float32)
    weight = codec.shaping.weight[:, own, channel]
    heads, units = len(factor), chains.length // 32
    half = factor.astype(np.float16)
    # A fragments of m16n8k16 with their columns dealt out so that a lane reads four neighbours (PTX ISA).
    lane, register = np.arange(32)[:, None], np.arange(4)
    row = (lane >> 2) + 8 * (register & 1)
    column = 4 * (lane & 3) + 2 * (register >> 1)
    tiles = half.reshape(heads, units, 2, 16, chains.length // 16, 16).transpose(0, 1, 2, 4, 3, 5)
    fragments = np.stack([tiles[..., row, column], tiles[..., row, column + 1]], -1)
    each = np.arange(units)
    blocks = half.reshape(heads, units, 32, units, 32)[:, each, :, each]  # [unit, head, in, from]
    inside = np.where(np.tri(32, k=-1), blocks, 0).astype(np.float16).transpose(1, 0, 3, 2)
    parts = [
        np.ascontiguousarray(fragments).view(np.uint32).reshape(heads, -1),
        _doubled(inside).reshape(heads, -1),
        _doubled(weight.astype(np.float16)).reshape(heads, -1),
    ]
    return np.concatenate(parts, axis=1)


def _doubled(x: NDArray[np.float16]) -> NDArray[np.uint32]:
    bits = np.ascontiguousarray(x).view(np.uint16).astype(np.uint32)
    return bits | bits << np.uint32(16)
