"""What the CUDA kernels are told: macros, parameter structures, and the shape of a decode launch.

Nothing here needs a GPU, so it is tested without one.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codec.codec import Codec
from ..codec.spec import CODES, PAGE, SCALE_FORMATS, SCALE_RULES, PageFormat
from ..codec.transform import Transform, random_signs
from .nvrtc import Macros

TYPES = {"float16": 0, "bfloat16": 1, "float32": 2}
ROTATIONS = {"none": 0, "hadamard": 1, "planar": 2, "custom": 2}
P, I64, I32, F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class TransformArgs(ctypes.Structure):
    _fields_ = [
        ("signs", P),
        ("in_matrix", P),
        ("out_matrix", P),
        ("mu", P),
        ("stride", I64),
        ("mu_stride", I64),
    ]


@dataclass(frozen=True, eq=False)
class Side:
    """What `TransformArgs` holds of one side of a codec, as arrays on the host; None for what the rotation lacks."""

    signs: NDArray[np.float32] | None
    in_matrix: NDArray[np.float32] | None
    out_matrix: NDArray[np.float32] | None
    mu: NDArray[np.float32] | None
    stride: int
    mu_stride: int

    @classmethod
    def of(cls, codec: Codec, t: Transform, encodes: bool) -> Side:
        """For what encodes, or for queries and outputs. A diagonal d turns the rotation's signs s to s d or s / d."""
        dim, rotation = codec.format.padded_dim, ROTATIONS[codec.rotation]
        signs = matrix = out = None
        if rotation == 1:
            s = random_signs(dim, codec.spec.seed)[None]
            d = 1.0 if t.diagonal is None else t.diagonal.astype(np.float64)
            signs = (s * d if encodes else s / d).astype(np.float32)
        if rotation == 2:
            matrix = t.forward.transpose(0, 2, 1) if encodes else t.inverse
            out = None if encodes else t.inverse.transpose(0, 2, 1)
        stride = (dim * dim if rotation == 2 else dim) if len(t.forward) > 1 else 0
        return cls(signs, matrix, out, t.mu, stride, dim if t.mu is not None and len(t.mu) > 1 else 0)


class DecodeParams(ctypes.Structure):
    """Params of kernels/cuda/decode_args.cuh."""

    _fields_ = [
        *((name, P) for name in ("q", "base", "offsets", "lengths", "exact_k", "exact_v", "exact_lengths")),
        *((name, P) for name in ("sink_logits", "out", "lse", "part", "part_ml", "counter")),
        ("k_transform", TransformArgs),
        ("v_transform", TransformArgs),
        *((name, I64 * 3) for name in ("q_stride", "k_stride", "v_stride")),
        ("max_pages", I64),
        *((name, I32) for name in ("kv_heads", "group", "n", "queries", "blocks", "causal")),
        *((name, I32) for name in ("chunks", "min_pages", "slots", "max_length")),
        *((name, F32) for name in ("scale_log2", "k_unit", "v_unit")),
    ]


class EncodeParams(ctypes.Structure):
    _fields_ = [
        *((name, P) for name in ("k", "v", "base", "offsets", "bad")),
        ("k_transform", TransformArgs),
        ("v_transform", TransformArgs),
        ("k_stride", I64 * 2),
        ("v_stride", I64 * 2),
        ("k_unit", F32),
        ("v_unit", F32),
    ]


class CompactParams(ctypes.Structure):
    _fields_ = [*((name, P) for name in ("base", "offsets", "out")), ("words", I64)]


COMPACT_MACROS: Macros = (("FORGE_PARAMS_BYTES", str(ctypes.sizeof(CompactParams))),)


class DecodePagesParams(ctypes.Structure):
    _fields_ = [
        *((name, P) for name in ("base", "offsets", "lengths", "k", "v")),
        ("k_transform", TransformArgs),
        ("v_transform", TransformArgs),
        ("max_pages", I64),
        ("kv_heads", I32),
        ("max_length", I32),
        ("k_unit", F32),
        ("v_unit", F32),
    ]


class ScoresParams(ctypes.Structure):
    """Params of kernels/cuda/scores_args.cuh."""

    _fields_ = [
        *((name, P) for name in ("q", "base", "offsets", "lengths", "out")),
        ("transform", TransformArgs),
        ("q_stride", I64 * 3),
        ("max_pages", I64),
        *((name, I32) for name in ("kv_heads", "group", "n", "queries", "blocks", "max_length")),
        ("scale", F32),
        ("unit", F32),
    ]


PARTS = 8
"""Most parts that one launch of merge_parts joins."""


class TurnQueriesParams(ctypes.Structure):
    _fields_ = [
        *((name, P) for name in ("q", "out", "shift")),
        ("transform", TransformArgs),
        ("q_stride", I64 * 3),
        *((name, I32) for name in ("rows", "q_heads", "group", "n")),
    ]


class MergePartsParams(ctypes.Structure):
    _fields_ = [
        ("part", P * PARTS),
        ("part_lse", P * PARTS),
        *((name, P) for name in ("shift", "sum", "out", "lse")),
        ("transform", TransformArgs),
        ("stride", I64 * (3 * PARTS)),
        *((name, I32) for name in ("rows", "kv_heads", "queries", "parts", "first", "last")),
        ("scale", F32),
    ]


class MergeParams(ctypes.Structure):
    _fields_ = [
        *((name, P) for name in ("a", "a_lse", "b", "b_lse", "out", "lse")),
        ("a_stride", I64 * 3),
        *((name, I32) for name in ("rows", "heads", "n")),
    ]


class AppendTokensParams(ctypes.Structure):
    _fields_ = [
        *((name, P) for name in ("k", "v", "to_k", "to_v", "lengths")),
        *((name, I64 * 3) for name in ("k_stride", "v_stride", "to_k_stride", "to_v_stride")),
        *((name, I32) for name in ("heads", "n", "words", "capacity")),
    ]


class Packer:
    """Fills a parameter structure several times faster than its ctypes constructor.

    Called with the values of the fields in order (arrays flat, structures as bytes), it gives the structure, which
    holds until the same thread calls again.
    """

    def __init__(self, params: type[ctypes.Structure]) -> None:
        self._params = params
        self._layout = struct.Struct("@" + "".join(_code(field[1]) for field in params._fields_))
        self._local = threading.local()

    def __call__(self, *values: Any) -> ctypes.Structure:
        try:
            out = self._local.out
        except AttributeError:
            out = self._local.out = self._params()
        self._layout.pack_into(out, 0, *values)
        return out


def _code(kind: Any) -> str:
    """The letters of module `struct` for a ctypes type. Nested structures are bytes: what precedes must align them."""
    if issubclass(kind, ctypes.Structure):
        return f"{ctypes.sizeof(kind)}s"
    if issubclass(kind, ctypes.Array):
        return str(kind._length_) + _code(kind._type_)
    return {P: "P", I64: "q", I32: "i", F32: "f"}[kind]


def scores_warps(fmt: PageFormat) -> int:
    return 4 if fmt.padded_dim <= 256 else 2


def scores_macros(codec: Codec, dtype: str) -> Macros:
    return macros(codec, ScoresParams, FORGE_TYPE=TYPES[dtype], FORGE_WARPS=scores_warps(codec.format))


def value_sum_shared_bytes(fmt: PageFormat) -> int:
    return scores_warps(fmt) * max(fmt.record_bytes, 8 * (fmt.padded_dim + 1) * 4)


def macros(codec: Codec, params: type[ctypes.Structure], **extra: int) -> Macros:
    """The macros of page.cuh, and the kernel's own."""
    fmt = codec.format
    common = {
        "FORGE_DIM": fmt.padded_dim,
        "FORGE_HEAD_DIM": fmt.head_dim,
        "FORGE_K_BITS": fmt.k_bits,
        "FORGE_V_BITS": fmt.v_bits,
        "FORGE_K_CODE": CODES.index(fmt.k_code),
        "FORGE_V_CODE": CODES.index(fmt.v_code),
        "FORGE_SCALES": SCALE_FORMATS.index(fmt.scales),
        "FORGE_K_LEVELS": ",".join(map(str, codec.k_codebook.levels)),
        "FORGE_V_LEVELS": ",".join(map(str, codec.v_codebook.levels)),
        "FORGE_ROTATION": ROTATIONS[codec.rotation],
        "FORGE_PARAMS_BYTES": ctypes.sizeof(params),
    }
    return tuple((name, str(value)) for name, value in {**common, **extra}.items())


def merge_macros(dim: int, dtype: str) -> Macros:
    named = {"FORGE_DIM": dim, "FORGE_TYPE": TYPES[dtype], "FORGE_PARAMS_BYTES": ctypes.sizeof(MergeParams)}
    return tuple((name, str(value)) for name, value in named.items())


def append_tokens_macros() -> Macros:
    return (("FORGE_PARAMS_BYTES", str(ctypes.sizeof(AppendTokensParams))),)


def rotation_macros(codec: Codec, params: type[ctypes.Structure], **extra: int) -> Macros:
    """The macros of kernels that rotate vectors and read no pages."""
    common = {
        "FORGE_DIM": codec.format.padded_dim,
        "FORGE_HEAD_DIM": codec.head_dim,
        "FORGE_ROTATION": ROTATIONS[codec.rotation],
        "FORGE_PARAMS_BYTES": ctypes.sizeof(params),
    }
    return tuple((name, str(value)) for name, value in {**common, **extra}.items())


def encode_macros(codec: Codec, dtype: str) -> Macros:
    spec = codec.spec
    return macros(
        codec,
        EncodeParams,
        FORGE_TYPE=TYPES[dtype],
        FORGE_KEY_MEAN=int(spec.key_mean),
        FORGE_K_RULE=SCALE_RULES.index(spec.k_scale_rule),
        FORGE_V_RULE=SCALE_RULES.index(spec.v_scale_rule),
    )


def encode_shared_bytes(fmt: PageFormat) -> int:
    d = fmt.padded_dim
    return 4 * (PAGE * (d + 1) + d + 3 * PAGE + 32 + 8) + PAGE * d


def decode_pages_shared_bytes(fmt: PageFormat) -> int:
    return 4 * (PAGE * (fmt.padded_dim + 4) + PAGE)


LIMITS = (
    "MULTIPROCESSOR_COUNT",
    "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN",
    "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR",
)
"""Names of the device attributes that `Limits` holds."""


@dataclass(frozen=True)
class Limits:
    """What a device offers to one launch. Defaults: H100."""

    processors: int = 132
    shared_per_block: int = 232448
    shared_per_processor: int = 233472


@dataclass(frozen=True)
class DecodePlan:
    """Shape of a decode launch. Fixed by the codec, the queries of a KV head and the device, never by the batch, so
    that a row's result is the same alone and in a batch."""

    queries: int  # of one KV head that a CTA holds
    blocks: int  # CTAs' worth of queries
    warps: int
    pages: int  # that a warp reads together
    groups: int  # of so many records, that a warp's ring holds
    ctas: int  # per multiprocessor
    chunks: int  # of one row and KV head, at most
    min_pages: int  # of a chunk
    shared_bytes: int

    def macros(self, codec: Codec, dtype: str, exact_dtype: str) -> Macros:
        return macros(
            codec,
            DecodeParams,
            FORGE_QUERIES=self.queries,
            FORGE_WARPS=self.warps,
            FORGE_PAGES=self.pages,
            FORGE_GROUPS=self.groups,
            FORGE_CTAS=self.ctas,
            FORGE_TYPE=TYPES[dtype],
            FORGE_EXACT_TYPE=TYPES[exact_dtype],
        )

    def row_chunks(self, length: int) -> int:
        """Chunks that pages of so many tokens are cut into."""
        return max(1, min(self.chunks, -(-length // PAGE) // self.min_pages))

    def slots(self, max_length: int, max_exact: int) -> int:
        """Partial results of a row and KV head: one per chunk and per task of exact tokens (Cut in decode_args.cuh)."""
        return self.row_chunks(max_length) + -(-max_exact // 16)

    def grid(self, batch: int, kv_heads: int, max_length: int) -> tuple[int, int, int]:
        return self.row_chunks(max_length), kv_heads * self.blocks, batch


def decode_plan(
    fmt: PageFormat,
    kv_heads: int,
    queries: int,
    limits: Limits,
    warps: int | None = None,
    ctas: int | None = None,
    pages: int | None = None,
    groups: int = 4,
    rounds: int = 2,
) -> DecodePlan:
    """The launch shape for `queries` query vectors per KV head (group times tokens); measured, not derived.

    To head_dim 128 two CTAs of eight warps share a multiprocessor with four queries or fewer (128 registers, two pages
    at a time), and one of twelve has it with eight (168 registers): half as many chunks to join make up for the warps.
    Larger ones take 255 registers. A chunk holds `rounds` groups of pages for every warp.
    """
    d = fmt.padded_dim
    held = 4 if queries <= 4 else 8 if queries <= 8 or d > 128 else 16
    blocks = -(-queries // held)
    light = d <= 128 and held <= 8
    eight = light and held == 8
    warps = warps or (12 if eight else 8)
    ctas = ctas or (2 if light and not eight else 1)
    pages = pages or (2 if light and held == 4 else 1)
    fixed = held * (2 * (d + 16) + 4 * d + 20) + warps * pages * PAGE * 4 + 64
    per_group = warps * (pages * fmt.record_bytes + 16)
    room = min(limits.shared_per_block, limits.shared_per_processor // ctas - 1024) - fixed
    # A warp's part of the ring holds its state at the end.
    needed = -(-max(held * (4 * (d + 8) + 8), 8 * d) // (pages * fmt.record_bytes))
    if room < needed * per_group:
        if ctas > 1:
            return decode_plan(fmt, kv_heads, queries, limits, warps, ctas - 1, pages, groups, rounds)
        if warps > 2:
            return decode_plan(fmt, kv_heads, queries, limits, warps // 2, ctas, pages, groups, rounds)
        if pages > 1:
            return decode_plan(fmt, kv_heads, queries, limits, pages=1)
        expected, got = fixed + needed * per_group, room + fixed
        raise ValueError(f"[decode_attention] expected {expected} bytes of shared memory; got {got}")
    groups = max(needed, min(groups, room // per_group))
    return DecodePlan(
        queries=held,
        blocks=blocks,
        warps=warps,
        pages=pages,
        groups=groups,
        ctas=ctas,
        chunks=max(1, limits.processors * ctas // (kv_heads * blocks)),
        min_pages=rounds * warps * pages,
        shared_bytes=fixed + groups * per_group,
    )
