"""The CUDA kernels that are compiled and tested, in one list."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from forgeattention.backends.cuda import plans
from forgeattention.backends.cuda.encoder import encode_plan
from forgeattention.backends.cuda.macros import TYPES, merge_macros, rotation_macros
from forgeattention.backends.cuda.nvrtc import Macros
from forgeattention.codec import Codec, CodecSpec


@dataclass(frozen=True)
class Case:
    """One codec, one shape of queries."""

    head_dim: int = 128
    group: int = 4
    n: int = 1
    k_bits: int = 3
    v_bits: int = 3
    k_code: str = "scalar"
    v_code: str = "scalar"
    scales: str = "log8"
    rotation: str = "hadamard"
    dtype: str = "float16"
    exact_dtype: str = "float16"
    key_mean: bool = True
    diagonal: bool = False

    def spec(self) -> CodecSpec:
        return CodecSpec(
            k_bits=self.k_bits,
            v_bits=self.v_bits,
            k_code=self.k_code,  # type: ignore[arg-type]
            v_code=self.v_code,  # type: ignore[arg-type]
            scales=self.scales,  # type: ignore[arg-type]
            rotation=self.rotation,  # type: ignore[arg-type]
            key_mean=self.key_mean,
            refine=False,
        )

    def codec(self, kv_heads: int = 2, **extra: Any) -> Codec:
        return Codec(self.spec(), self.head_dim, kv_heads, **extra)

    def __str__(self) -> str:
        short = {"scalar": "", "trellis4": "t4", "trellis8": "t8"}
        return (
            f"d{self.head_dim}-g{self.group}x{self.n}-k{self.k_bits}{short[self.k_code]}-v{self.v_bits}{short[self.v_code]}"
            f"-{self.scales}-{self.rotation}-{self.dtype}-{self.exact_dtype}"
            + ("" if self.key_mean else "-nomean")
            + ("-diagonal" if self.diagonal else "")
        )


_T = {"k_code": "trellis8", "v_code": "scalar"}
_TT = {"k_code": "trellis4", "v_code": "trellis8"}
CASES = [
    Case(),
    Case(**_T),
    Case(**_TT),
    Case(scales="fp16"),
    Case(k_code="trellis4", scales="fp16", key_mean=False),
    *(Case(head_dim=d, **_T) for d in (64, 80, 96, 256, 512)),
    *(Case(head_dim=d, scales="fp16", group=1) for d in (64, 96, 256, 512)),
    *(Case(group=g, **_T) for g in (1, 3, 7, 8, 16)),
    Case(group=12, **_TT),
    Case(head_dim=64, group=3),
    Case(head_dim=256, group=8, **_T),
    Case(head_dim=512, group=7),
    *(Case(n=n, **_T) for n in (2, 4, 8)),
    Case(group=1, n=8),
    Case(group=5, n=3, head_dim=64, **_T),
    *(Case(k_bits=k, v_bits=v) for k, v in ((2, 2), (4, 4), (4, 2), (2, 4))),
    Case(k_bits=2, v_bits=2, k_code="trellis8", v_code="trellis4"),
    Case(k_bits=4, v_bits=3, head_dim=64, v_code="trellis8", scales="fp16"),
    Case(rotation="none", dtype="float32", exact_dtype="float32"),
    Case(rotation="planar", dtype="bfloat16", exact_dtype="bfloat16", **_T),
    Case(rotation="custom", dtype="float32", exact_dtype="bfloat16"),
    Case(head_dim=80, rotation="custom", group=2, dtype="bfloat16", exact_dtype="float32"),
    Case(diagonal=True, dtype="bfloat16", exact_dtype="bfloat16", **_T),
    *(Case(head_dim=d, group=3, diagonal=True, **_T) for d in (64, 80)),
]


def kernels(case: Case, kv_heads: int = 2) -> list[tuple[str, Macros]]:
    """(stem, macros) of every kernel that a case runs."""
    matrix = [[float(i == j) for j in range(case.head_dim)] for i in range(case.head_dim)]
    extra = {"k_matrix": matrix, "v_matrix": matrix} if case.rotation == "custom" else {}
    codec = case.codec(kv_heads, **extra)
    plan = plans.decode_plan(codec.format, kv_heads, case.group * case.n, plans.Limits())
    queries = case.group * case.n
    sparse = [plans.sparse_plan(codec.format, kv_heads, queries, plans.Limits(), keys) for keys in (True, False)]
    return [
        ("decode_attention", plan.macros(codec, case.dtype, case.exact_dtype)),
        ("decode_attention", plan.macros(codec, case.dtype, case.exact_dtype, 8)),
        ("page_tables", ()),
        ("paged_append", ()),
        ("compact", ()),
        ("encode", encode_plan(codec).macros(codec, case.dtype)),
        ("encode_layers", encode_plan(codec).macros(codec, case.dtype)),
        ("decode_pages", plans.decode_pages_macros(codec, "float32", False)),
        ("decode_pages", plans.decode_pages_macros(codec, "float16", True)),
        ("merge", merge_macros(case.head_dim, case.dtype)),
        ("append_tokens", ()),
        ("append_step", ()),
        ("turn_queries", rotation_macros(codec, FORGE_TYPE=TYPES[case.dtype])),
        ("merge_parts", rotation_macros(codec)),
        ("qk_scores", plans.scores_macros(codec, case.dtype)),
        ("value_sum", plans.scores_macros(codec, "float32")),
        ("sparse_scores", sparse[0].macros(codec, case.dtype)),
        ("page_scores", plans.page_scores_macros(codec, case.dtype)),
        ("page_select", ()),
        ("sparse_threshold", plans.threshold_macros()),
        ("sparse_attention", sparse[1].macros(codec, case.dtype)),
    ]


def unique_kernels() -> list[tuple[str, Macros]]:
    return sorted({k for case in CASES for k in kernels(case)})


def without(case: Case, **changes: Any) -> Case:
    return replace(case, **changes)
