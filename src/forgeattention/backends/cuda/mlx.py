"""MLX arrays on NVIDIA GPUs: the kernels of kernels/cuda through `mx.fast.precompiled_cuda_kernel`.

Launches are nodes of MLX's own graphs, in its stream. Only `encode` waits for the device. Pages are coded as the torch
backend codes them (pages.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from ...codec.codec import Codec
from ...codec.spec import PAGE
from ...ops.arrays import dtype_of
from ...ops.exact_mlx import attention
from ...ops.table import ExactTokens, PageTable
from ..mlx.arrays import page_places, some_exact, some_table, store_pages
from ..mlx.codec import packed_queries, unpacked_values
from ..mlx.merge import merge
from . import nvrtc, params, plans
from .encoder import encode_plan, feedback_words
from .macros import Side

DEVICE = 0
LOG2E = math.log2(math.e)
SCORES = 1 << 26
"""Scores of a prefill chunk that are held at a time, 256 MiB."""


@cache
def limits() -> plans.Limits:
    return plans.Limits(*nvrtc.attributes(DEVICE, *plans.LIMITS))


@cache
def _code(kernel: str, macros: nvrtc.Macros, outputs: tuple[str, ...]) -> bytes:
    return nvrtc.cubin(kernel, macros, nvrtc.architecture(*nvrtc.capability(DEVICE)), outputs)


@dataclass(frozen=True)
class Launch:
    """One launch; members by the names that the kernel's table in params.py gives them.

    Attributes:
        kernel: file in kernels/cuda.
        macros: what the kernel is compiled with.
        members: arrays that it reads, contiguous or made so (None for none), and numbers.
        outputs: (shape, dtype name).
        groups: CTAs in x, y, z.
        threads: of a CTA.
        shared_bytes: dynamic shared memory.
        zeroed: outputs are zero before.
    """

    kernel: str
    macros: nvrtc.Macros
    members: Mapping[str, Any]
    outputs: Mapping[str, tuple[tuple[int, ...], str]]
    groups: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0
    zeroed: bool = False

    def run(self) -> list[mx.array]:
        x, y, z = self.groups
        outputs = tuple(self.outputs)
        inputs, scalars = params.STRUCTS[self.kernel].mlx_arguments(self.members, outputs)
        return mx.fast.precompiled_cuda_kernel(
            name=f"mlx_{self.kernel}",
            compiled_source=_code(self.kernel, self.macros, outputs),
            inputs=inputs,
            output_shapes=[shape for shape, _ in self.outputs.values()],
            output_dtypes=[getattr(mx, dtype) for _, dtype in self.outputs.values()],
            scalars=scalars,
            grid=(x * self.threads, y, z),
            threadgroup=(self.threads, 1, 1),
            shared_memory=self.shared_bytes,
            init_value=0.0 if self.zeroed else None,
            ensure_row_contiguous=True,
            stream=mx.gpu,
        )


class _Constants:
    """A codec on the device, and what its launches have in common, by what calls vary in.

    Attributes:
        encode, attend: the transforms of keys and of values, members of `params.TRANSFORM`: for what encodes, and for
            queries and outputs.
        feedback: of shaped keys, or None, and the words between heads, 0 if all share one.
        known: plans and macros of decode launches.
        nothing: no packed and no exact tokens, by batch.
    """

    def __init__(self, codec: Codec) -> None:
        sides = codec.k_transform, codec.v_transform
        self.encode, self.attend = ([_members(Side.of(codec, t, encodes)) for t in sides] for encodes in (True, False))
        self.feedback: tuple[Any, int] = None, 0
        if codec.shaping is not None:
            words = feedback_words(codec)
            self.feedback = mx.array(words.view(np.int32)), words.shape[1] if len(words) > 1 else 0
        self.known: dict[Any, tuple[plans.DecodePlan, nvrtc.Macros]] = {}
        self.nothing: dict[int, tuple[PageTable, ExactTokens]] = {}


def _members(side: Side) -> dict[str, Any]:
    arrays = {name: getattr(side, name) for name in ("signs", "in_matrix", "out_matrix", "mu")}
    made = {name: None if x is None else mx.array(np.ascontiguousarray(x, np.float32)) for name, x in arrays.items()}
    return {**made, "stride": side.stride, "mu_stride": side.mu_stride}


_constants: WeakKeyDictionary[Codec, _Constants] = WeakKeyDictionary()


def _constants_of(codec: Codec) -> _Constants:
    if codec not in _constants:
        _constants[codec] = _Constants(codec)
    return _constants[codec]


def _units(codec: Codec) -> dict[str, float]:
    return {"k_unit": codec.k_codebook.unit, "v_unit": codec.v_codebook.unit}


def _pages(table: PageTable) -> dict[str, Any]:
    pages = {"base": table.base, "page_table": table.page_table, "lengths": table.lengths}
    return {**pages, "max_pages": table.page_table.shape[1]}


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a contiguous array, but for its last axis."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape) - 1))


def decode_attention(
    q: Any,
    codec: Codec,
    table: PageTable | None,
    exact: ExactTokens | None,
    scale: float,
    causal: bool,
    sink_logits: Any | None,
) -> tuple[Any, Any]:
    """See `forgeattention.ops.decode_attention`."""
    batch, q_heads, n, _ = q.shape
    if 0 in q.shape:
        return mx.zeros(q.shape, dtype=q.dtype), mx.zeros(q.shape[:3])
    constants = _constants_of(codec)
    if table is None or exact is None:
        empty = constants.nothing.get(batch)
        if empty is None:
            empty = constants.nothing[batch] = some_table(None, batch, mx), some_exact(None, batch, codec, mx)
        table, exact = table or empty[0], exact or empty[1]
    table = some_table(table, batch, mx)
    group = q_heads // codec.kv_heads
    key = q_heads, n, q.dtype, exact.k.dtype
    if key not in constants.known:
        plan = plans.decode_plan(codec.format, codec.kv_heads, group * n, limits())
        constants.known[key] = plan, plan.macros(codec, dtype_of(q), dtype_of(exact.k))
    plan, macros = constants.known[key]
    heads = batch * codec.kv_heads * plan.query_tiles
    partial_count = plan.partials(table.max_length, exact.max_length)
    parts = heads * partial_count * plan.query_tile
    out, lse, *_ = Launch(
        "decode_attention",
        macros,
        {
            "q": q,
            **_pages(table),
            "exact_k": exact.k,
            "exact_v": exact.v,
            "exact_lengths": exact.lengths,
            "exact_blocks": None,
            "sink_logits": sink_logits,
            "counter": mx.zeros((heads,), dtype=mx.int32),
            "k_transform": constants.attend[0],
            "v_transform": constants.attend[1],
            "q_stride": _strides(q.shape),
            "k_stride": _strides(exact.k.shape),
            "v_stride": _strides(exact.v.shape),
            "out_stride": _strides(q.shape),
            "exact_stride": 0,
            "kv_heads": codec.kv_heads,
            "group": group,
            "n": n,
            "queries": group * n,
            "query_tiles": plan.query_tiles,
            "causal": causal,
            "num_splits": plan.num_splits,
            "min_pages": plan.min_pages,
            "partials": partial_count,
            "max_length": table.max_length,
            "scale_log2": scale * LOG2E,
            **_units(codec),
        },
        {
            "out": (q.shape, dtype_of(q)),
            "lse": ((batch, q_heads, n), "float32"),
            "part": ((parts * codec.format.padded_dim,), "float32"),
            "part_ml": ((parts * 2,), "float32"),
        },
        plan.grid(batch, codec.kv_heads, table.max_length),
        32 * plan.warps,
        plan.shared_bytes,
    ).run()
    return out, lse


def compact(base: Any | None, offsets: Any, page_bytes: int) -> Any:
    """See `forgeattention.ops.compact`."""
    if base is None:
        raise ValueError("[compact] expected an array that holds the pages; got absolute addresses")
    pages = offsets.shape[0]
    if pages == 0:
        return mx.zeros((0, page_bytes), dtype=mx.uint8)
    (out,) = Launch(
        "compact",
        (),
        {"base": base, "offsets": offsets, "words": page_bytes // 16},
        {"out": ((pages, page_bytes), "uint8")},
        (-(-page_bytes // (16 * 4 * 256)), pages, 1),
        256,
    ).run()
    return out


def decode_pages(codec: Codec, table: PageTable, dtype: str, rotated: bool) -> tuple[Any, Any]:
    """See `forgeattention.ops.decode_pages`."""
    table = some_table(table, 0, mx)
    width = codec.format.padded_dim if rotated else codec.head_dim
    shape = (table.lengths.shape[0], codec.kv_heads, table.max_length, width)
    if 0 in shape:
        return (mx.zeros(shape, dtype=getattr(mx, dtype)),) * 2
    k_side, v_side = _constants_of(codec).attend
    if rotated:
        k_side, v_side = ({**side, "mu": None, "mu_stride": 0} for side in (k_side, v_side))
    k, v = Launch(
        "decode_pages",
        plans.decode_pages_macros(codec, dtype, rotated),
        {
            **_pages(table),
            "k_transform": k_side,
            "v_transform": v_side,
            "kv_heads": codec.kv_heads,
            "max_length": table.max_length,
            **_units(codec),
        },
        {"k": (shape, dtype), "v": (shape, dtype)},
        (-(-table.max_length // PAGE), codec.kv_heads, shape[0]),
        256,
        plans.decode_pages_layout(codec.format).bytes,
    ).run()
    return k, v


def encode(k: Any, v: Any, codec: Codec, out: Any | None, offsets: Any) -> None:
    """See `forgeattention.ops.encode`. Waits for the GPU, to know that every vector could be coded."""
    where = page_places(out, offsets, codec)
    pages, dim = len(where), codec.head_dim
    constants, plan = _constants_of(codec), encode_plan(codec, limits())
    k_side, v_side = constants.encode
    feedback, feedback_stride = constants.feedback
    strides = PAGE * dim, k.shape[1] * dim, dim
    records, bad = Launch(
        "encode",
        plan.macros(codec, dtype_of(k)),
        {
            "k": k,
            "v": v,
            "offsets": mx.arange(pages).astype(mx.int64) * codec.page_bytes,
            "k_transform": k_side,
            "v_transform": v_side,
            "k_stride": strides,
            "v_stride": strides,
            "slots": None,
            "exact_block": 0,
            "feedback": feedback,
            "feedback_stride": feedback_stride,
            **_units(codec),
        },
        {"base": ((pages, codec.page_bytes), "uint8"), "bad": ((1,), "int32")},
        (pages, codec.kv_heads, 1),
        256,
        plan.shared_bytes,
        zeroed=True,
    ).run()
    if bad.item():
        raise ValueError(f"[encode] expected finite k and v that {codec.spec.scales} scales can hold; got others")
    store_pages(out, records, where)


def _scores_members(codec: Codec, table: PageTable, x: Any, side: int) -> dict[str, Any]:
    group, n = x.shape[1] // codec.kv_heads, x.shape[2]
    return {
        "q": x,
        **_pages(table),
        "transform": _constants_of(codec).attend[side],
        "q_stride": _strides(x.shape),
        "kv_heads": codec.kv_heads,
        "group": group,
        "n": n,
        "queries": group * n,
        "query_tiles": -(-group * n // 8),
        "max_length": table.max_length,
        "unit": (codec.k_codebook, codec.v_codebook)[side].unit,
    }


def qk_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    """See `forgeattention.ops.qk_scores`."""
    shape = (*q.shape[:3], table.max_length)
    if 0 in shape:
        return mx.zeros(shape)
    table = some_table(table, q.shape[0], mx)
    members = _scores_members(codec, table, q, 0)
    warps, pages = plans.scores_warps(codec.format), -(-table.max_length // PAGE)
    across = codec.kv_heads * members["query_tiles"]
    groups = min(-(-pages // warps), max(1, 8 * limits().processors // (across * q.shape[0])))
    return Launch(
        "qk_scores",
        plans.scores_macros(codec, dtype_of(q)),
        {**members, "scale": scale},
        {"out": (shape, "float32")},
        (groups, across, q.shape[0]),
        32 * warps,
    ).run()[0]


def value_sum(p: Any, codec: Codec, table: PageTable) -> Any:
    """See `forgeattention.ops.value_sum`. Weights that are not finite give an undefined result."""
    batch, q_heads, n, _ = p.shape
    if 0 in p.shape:
        return mx.zeros((batch, q_heads, n, codec.head_dim))
    table = some_table(table, batch, mx)
    members = _scores_members(codec, table, p, 1)
    warps, pages = plans.scores_warps(codec.format), -(-table.max_length // PAGE)
    splits = max(1, min(64, pages // (2 * warps)))  # by max_length alone, so that a row's result ignores the batch
    (sums,) = Launch(
        "value_sum",
        plans.scores_macros(codec, "float32"),
        {**members, "scale": 1.0},
        {"out": ((splits, batch, q_heads, n, codec.head_dim), "float32")},
        (splits, codec.kv_heads * members["query_tiles"], batch),
        32 * warps,
        plans.value_sum_shared_bytes(codec.format),
    ).run()
    return sums.sum(0)


def prefill_attention(q: Any, codec: Codec, table: PageTable, scale: float) -> tuple[Any, Any]:
    """See `forgeattention.ops.prefill_attention`. Pages are decoded, without rotating them back, a bounded number at a
    time; their attention is MLX's own products, joined by the log-sum-exp."""
    batch, heads, n, _ = q.shape
    table = some_table(table, batch, mx)
    padded = codec.format.padded_dim
    o, lse = mx.zeros((batch, heads, n, padded)), mx.full((batch, heads, n), -mx.inf)
    if 0 in q.shape or not table.max_length:
        return mx.zeros(q.shape), lse
    turned, _, bias = packed_queries(q, codec, scale, mx)
    step = max(1, SCORES // (batch * heads * n * PAGE))
    for first in range(0, -(-table.max_length // PAGE), step):
        tokens = min(table.max_length - first * PAGE, step * PAGE)
        lengths = mx.clip(table.lengths - first * PAGE, 0, tokens)
        part = PageTable(table.base, table.page_table[:, first : first + step], lengths, tokens)
        k, v = decode_pages(codec, part, "float16", True)
        valid = (mx.arange(tokens) < lengths[:, None])[:, None]
        o, lse = merge(o, lse, *attention(turned, k, v, valid, 1.0))
    mass = mx.where(lse == -mx.inf, 0.0, 1.0)
    return unpacked_values(o, mass, codec, mx), lse + bias
