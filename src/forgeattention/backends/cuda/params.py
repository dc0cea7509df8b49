"""What the CUDA kernels are told: macros and parameter structures. Nothing here needs a GPU."""

from __future__ import annotations

import ctypes
import struct
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...codec.codec import Codec
from ...codec.spec import CODES, SCALE_FORMATS, SCALE_RULES
from ...codec.transform import Transform, random_signs
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
        ("exact_blocks", P),
        *((name, P) for name in ("sink_logits", "out", "lse", "part", "part_ml", "counter")),
        ("k_transform", TransformArgs),
        ("v_transform", TransformArgs),
        *((name, I64 * 3) for name in ("q_stride", "k_stride", "v_stride", "out_stride")),
        *((name, I64) for name in ("max_pages", "exact_stride")),
        *((name, I32) for name in ("kv_heads", "group", "n", "queries", "blocks", "causal")),
        *((name, I32) for name in ("chunks", "min_pages", "slots", "max_length")),
        *((name, F32) for name in ("scale_log2", "k_unit", "v_unit")),
    ]


class EncodeParams(ctypes.Structure):
    _fields_ = [
        *((name, P) for name in ("k", "v", "base", "offsets", "slots", "bad")),
        ("k_transform", TransformArgs),
        ("v_transform", TransformArgs),
        ("k_stride", I64 * 3),
        ("v_stride", I64 * 3),
        ("exact_block", I64),
        ("k_unit", F32),
        ("v_unit", F32),
    ]


class EncodeLayersParams(ctypes.Structure):
    _fields_ = [*((name, P) for name in ("layers", "filled", "fills")), ("count", I32), ("kv_heads", I32)]


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


class SparseScoresParams(ctypes.Structure):
    """Params of kernels/cuda/sparse_scores.cu."""

    _fields_ = [
        *((name, P) for name in ("q", "base", "offsets", "lengths", "scores", "stats")),
        ("transform", TransformArgs),
        ("q_stride", I64 * 3),
        ("max_pages", I64),
        *((name, I32) for name in ("kv_heads", "group", "n", "queries", "blocks", "pages")),
        ("scale", F32),
        ("unit", F32),
    ]


class PageScoresParams(ctypes.Structure):
    """Params of kernels/cuda/page_scores.cu."""

    _fields_ = [
        *((name, P) for name in ("q", "base", "offsets", "lengths", "out")),
        ("transform", TransformArgs),
        ("q_stride", I64 * 3),
        ("max_pages", I64),
        *((name, I32) for name in ("kv_heads", "group", "n", "queries", "blocks", "pages")),
        ("scale", F32),
    ]


class PageSelectParams(ctypes.Structure):
    """Params of kernels/cuda/page_select.cu."""

    _fields_ = [
        *((name, P) for name in ("means", "offsets", "lengths", "chosen", "tokens", "read")),
        ("max_pages", I64),
        *((name, I32) for name in ("kv_heads", "queries", "pages", "budget", "record")),
    ]


class SparseThresholdParams(ctypes.Structure):
    """Params of kernels/cuda/sparse_threshold.cu."""

    _fields_ = [
        *((name, P) for name in ("scores", "stats", "lengths", "budgets", "exact_lse")),
        *((name, P) for name in ("threshold", "last", "kept", "dropped", "top")),
        *((name, I32) for name in ("q_heads", "n", "pages", "budget")),
        ("top_p", F32),
    ]


class SparseAttentionParams(ctypes.Structure):
    """Params of kernels/cuda/sparse_attention.cu."""

    _fields_ = [
        *((name, P) for name in ("scores", "stats", "threshold", "top", "last", "base", "offsets", "lengths")),
        *((name, P) for name in ("other", "other_lse", "out", "lse", "part", "counter")),
        ("transform", TransformArgs),
        ("max_pages", I64),
        *((name, I32) for name in ("kv_heads", "queries", "blocks", "pages")),
        ("unit", F32),
    ]


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


class PageTablesParams(ctypes.Structure):
    _fields_ = [
        *((name, P) for name in ("starts", "lengths", "packed_table", "exact_table", "offsets", "packed", "blocks")),
        *((name, P) for name in ("exact", "fill_offsets", "filled", "fills", "fill_tokens")),
        *((name, I64) for name in ("block_bytes", "page_bytes")),
        *((name, I64) for name in ("packed_stride", "exact_stride", "max_pages", "max_blocks")),
        *((name, I32) for name in ("decode_rows", "window", "pages_per_block", "exact_block", "sink_blocks")),
        ("fill_exact", I32),
    ]


class PagedAppendParams(ctypes.Structure):
    _fields_ = [
        *((name, P) for name in ("k", "v", "cache", "slots", "fill_offsets", "fill_tokens", "fill_k", "fill_v")),
        *((name, I64 * 2) for name in ("k_stride", "v_stride")),
        ("cache_stride", I64 * 3),
        ("fill_stride", I64),
        *((name, I32) for name in ("tokens", "heads", "words", "exact_block")),
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


def page_tables_macros() -> Macros:
    return (("FORGE_PARAMS_BYTES", str(ctypes.sizeof(PageTablesParams))),)


def paged_append_macros() -> Macros:
    return (("FORGE_PARAMS_BYTES", str(ctypes.sizeof(PagedAppendParams))),)


def rotation_macros(codec: Codec, params: type[ctypes.Structure], **extra: int) -> Macros:
    """The macros of kernels that rotate vectors and read no pages."""
    common = {
        "FORGE_DIM": codec.format.padded_dim,
        "FORGE_HEAD_DIM": codec.head_dim,
        "FORGE_ROTATION": ROTATIONS[codec.rotation],
        "FORGE_PARAMS_BYTES": ctypes.sizeof(params),
    }
    return tuple((name, str(value)) for name, value in {**common, **extra}.items())


def encode_layers_macros(codec: Codec, dtype: str) -> Macros:
    return (*encode_macros(codec, dtype), ("FORGE_LAYERS_BYTES", str(ctypes.sizeof(EncodeLayersParams))))


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
