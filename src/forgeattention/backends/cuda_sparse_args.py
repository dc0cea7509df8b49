"""What the CUDA kernels of sparse attention are told. Nothing here needs a GPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from ..codec.codec import Codec
from ..codec.spec import PageFormat
from .cuda_args import F32, I32, I64, TYPES, Limits, P, TransformArgs, macros
from .nvrtc import Macros

THRESHOLD_BYTES = 8 * (8192 + 2048) + 4 * 8192 + 12 * 1024 + 8 * 33 + 16
"""Shared memory of sparse_threshold: its three lists, its bins."""
FEW_PAGES, MOST_PAGES = 16384, 49152
"""Pages whose ranks page_select has room for in shared memory: on any device, and on those with more than 192 KB."""


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


@dataclass(frozen=True)
class SparsePlan:
    """Shape of a launch of sparse_scores or sparse_attention. Fixed by the codec, the queries of a KV head and the
    device, never by the batch or its lengths.

    Attributes:
        queries: of one KV head that a CTA holds.
        blocks: CTAs' worth of queries.
        warps, stages: of a CTA; pages that each warp has in flight.
        ctas: per multiprocessor.
        splits: CTAs over which the pages of one head are dealt out.
        shared_bytes: dynamic shared memory of a CTA.
    """

    queries: int
    blocks: int
    warps: int
    stages: int
    ctas: int
    splits: int
    shared_bytes: int

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def macros(self, codec: Codec, params: type[ctypes.Structure], dtype: str) -> Macros:
        return macros(
            codec,
            params,
            FORGE_QUERIES=self.queries,
            FORGE_WARPS=self.warps,
            FORGE_STAGES=self.stages,
            FORGE_CTAS=self.ctas,
            FORGE_TYPE=TYPES[dtype],
        )


def sparse_plan(fmt: PageFormat, kv_heads: int, queries: int, limits: Limits, keys: bool) -> SparsePlan:
    """The shape for `queries` query vectors per KV head, of sparse_scores (`keys`) or of sparse_attention."""
    d = fmt.padded_dim
    held = 4 if keys and queries <= 4 else 8
    blocks = -(-queries // held)
    warps, ctas = (8, 2) if d <= 128 else (8, 1) if d <= 256 else (4, 1)
    # Static shared memory: scales, terms of the queries, constants.
    fixed = 4 * 64 * warps + (held * (2 * (d + 16) + 16) if keys else 32) + 64
    room = min(limits.shared_per_block, limits.shared_per_processor // ctas - 1024) - fixed
    part = fmt.v_offset if keys else fmt.record_bytes - fmt.mean_offset
    stages = min(4, room // (warps * (part + 16)))
    sums = 0 if keys else warps * 8 * (d + 1) * 4
    splits = max(1, limits.processors * ctas // (kv_heads * blocks))
    return SparsePlan(held, blocks, warps, stages, ctas, splits, max(warps * stages * (part + 16), sums))


PAGE_SCORES_WARPS = 4


def page_scores_macros(codec: Codec, dtype: str) -> Macros:
    return macros(codec, PageScoresParams, FORGE_WARPS=PAGE_SCORES_WARPS, FORGE_TYPE=TYPES[dtype])


def threshold_macros() -> Macros:
    sizes = {"FORGE_PARAMS_BYTES": ctypes.sizeof(SparseThresholdParams), "FORGE_SHARED_BYTES": THRESHOLD_BYTES}
    return tuple((name, str(size)) for name, size in sizes.items())


def page_select_macros() -> Macros:
    return (("FORGE_PARAMS_BYTES", str(ctypes.sizeof(PageSelectParams))),)
