"""MLX arrays on NVIDIA GPUs: the kernels of kernels/cuda through `mx.fast.precompiled_cuda_kernel`.

Launches are nodes of MLX's own graphs, in its stream. Only `encode` waits for the device. Pages are coded as the torch
backend codes them (pages.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from ...codec.codec import Codec
from ...codec.spec import PAGE
from ...ops.arrays import dtype_of
from ...ops.table import ExactTokens, PageTable
from ..mlx.arrays import page_places, some_exact, some_table, store_pages
from ..mlx.attention import attention, merge
from ..mlx.codec import packed_queries, unpacked_values
from . import nvrtc, plans
from . import params as args

log = logging.getLogger("forgeattention")

DEVICE = 0
LOG2E = math.log2(math.e)
SCORES = 1 << 26
"""Scores of a prefill chunk that are held at a time, 256 MiB."""


@cache
def limits() -> plans.Limits:
    return plans.Limits(*nvrtc.attributes(DEVICE, *plans.LIMITS))


@cache
def _code(kernel: str, macros: nvrtc.Macros) -> bytes:
    return nvrtc.cubin(kernel, macros, nvrtc.architecture(*nvrtc.capability(DEVICE)))


@dataclass(frozen=True)
class Launch:
    """One launch; arrays and scalars by the names that kernels/cuda/mlx_<op>.cu gives them, in its order.

    Attributes:
        op: the op.
        macros: what the kernel is compiled with.
        inputs: arrays.
        outputs: (shape, dtype name).
        scalars: ints and floats of 32 bits.
        groups: CTAs in x, y, z.
        threads: of a CTA.
        shared_bytes: dynamic shared memory.
        zeroed: outputs are zero before.
    """

    op: str
    macros: nvrtc.Macros
    inputs: Mapping[str, mx.array]
    outputs: Mapping[str, tuple[tuple[int, ...], str]]
    scalars: Mapping[str, int | float]
    groups: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0
    zeroed: bool = False

    def run(self) -> list[mx.array]:
        x, y, z = self.groups
        return mx.fast.precompiled_cuda_kernel(
            name=f"mlx_{self.op}",
            compiled_source=_code(f"mlx_{self.op}", self.macros),
            inputs=list(self.inputs.values()),
            output_shapes=[shape for shape, _ in self.outputs.values()],
            output_dtypes=[getattr(mx, dtype) for _, dtype in self.outputs.values()],
            # MLX takes only floats that 32 bits hold.
            scalars=[float(np.float32(x)) if isinstance(x, float) else x for x in self.scalars.values()],
            grid=(x * self.threads, y, z),
            threadgroup=(self.threads, 1, 1),
            shared_memory=self.shared_bytes,
            init_value=0.0 if self.zeroed else None,
            ensure_row_contiguous=True,
            stream=mx.gpu,
        )


class _Side:
    """One side's transform on the device. What a transform lacks is `nothing`."""

    def __init__(self, side: args.Side, nothing: mx.array) -> None:
        arrays = {"signs": side.signs, "in": side.in_matrix, "out": side.out_matrix, "mu": side.mu}
        self._arrays = {
            name: nothing if x is None else mx.array(np.ascontiguousarray(x, np.float32)) for name, x in arrays.items()
        }
        self._given = int(side.mu is not None)
        self._strides = {"stride": side.stride, "mu_stride": side.mu_stride}

    def arrays(self, name: str) -> dict[str, mx.array]:
        """By the side's name in a kernel."""
        return {f"{name}_{key}": x for key, x in self._arrays.items()}

    def scalars(self, name: str, mu: bool = True) -> dict[str, int]:
        """Likewise; without mu, vectors stay centred."""
        return {f"{name}_{key}": x for key, x in {"given": int(self._given and mu), **self._strides}.items()}


class _Constants:
    """A codec on the device, and what its launches have in common, by what calls vary in."""

    def __init__(self, codec: Codec) -> None:
        nothing = mx.zeros((4,), dtype=mx.float32)
        sides = codec.k_transform, codec.v_transform
        self.encode, self.attend = (
            [_Side(args.Side.of(codec, t, encodes), nothing) for t in sides] for encodes in (True, False)
        )
        self.known: dict[Any, Any] = {}
        self.nothing: dict[int, tuple[PageTable, ExactTokens]] = {}  # by batch


_constants: WeakKeyDictionary[Codec, _Constants] = WeakKeyDictionary()


def _constants_of(codec: Codec) -> _Constants:
    if codec not in _constants:
        _constants[codec] = _Constants(codec)
    return _constants[codec]


def _units(codec: Codec) -> dict[str, float]:
    return {"k_unit": float(codec.k_codebook.unit), "v_unit": float(codec.v_codebook.unit)}


def _pages(table: PageTable) -> dict[str, Any]:
    return {"base": table.base, "offsets": table.offsets, "lengths": table.lengths}


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
    key = q_heads, n, q.dtype, exact.k.dtype
    known = constants.known.get(key)
    if known is None:
        known = constants.known[key] = _Decode(codec, constants, q_heads, n, (dtype_of(q), dtype_of(exact.k)))
    plan = known.plan
    heads = batch * codec.kv_heads * plan.blocks
    slots = plan.slots(table.max_length, exact.max_length)
    parts = heads * slots * plan.queries
    out, lse, *_ = Launch(
        "decode_attention",
        known.macros,
        {
            "q": q,
            **_pages(table),
            "exact_k": exact.k,
            "exact_v": exact.v,
            "exact_lengths": exact.lengths,
            "sink_logits": exact.lengths if sink_logits is None else sink_logits,
            "counter": mx.zeros((heads,), dtype=mx.int32),
            **known.arrays,
        },
        {
            "out": (q.shape, dtype_of(q)),
            "lse": ((batch, q_heads, n), "float32"),
            "part": ((parts * codec.format.padded_dim,), "float32"),
            "part_ml": ((parts * 2,), "float32"),
        },
        {
            **known.scalars,
            "sinks_given": int(sink_logits is not None),
            "capacity": exact.k.shape[2],
            "max_pages": table.offsets.shape[1],
            "causal": int(causal),
            "slots": slots,
            "max_length": table.max_length,
            "scale_log2": scale * LOG2E,
        },
        plan.grid(batch, codec.kv_heads, table.max_length),
        32 * plan.warps,
        plan.shared_bytes,
    ).run()
    return out, lse


class _Decode:
    """What decode launches for one codec, number of queries and pair of dtypes have in common."""

    def __init__(self, codec: Codec, constants: _Constants, q_heads: int, n: int, dtypes: tuple[str, str]) -> None:
        group = q_heads // codec.kv_heads
        self.plan = plans.decode_plan(codec.format, codec.kv_heads, group * n, limits())
        self.macros = self.plan.macros(codec, *dtypes)
        k, v = constants.attend
        self.arrays = {**k.arrays("k"), **v.arrays("v")}
        # In the order of the entry; what is 0 here differs from call to call.
        self.scalars: dict[str, int | float] = {
            "sinks_given": 0,
            **k.scalars("k"),
            **v.scalars("v"),
            **dict.fromkeys(("capacity", "max_pages"), 0),
            "kv_heads": codec.kv_heads,
            "group": group,
            "n": n,
            "queries": group * n,
            "blocks": self.plan.blocks,
            "causal": 0,
            "chunks": self.plan.chunks,
            "min_pages": self.plan.min_pages,
            "slots": 0,
            "max_length": 0,
            "scale_log2": 0.0,
            **_units(codec),
        }


def compact(base: Any | None, offsets: Any, page_bytes: int) -> Any:
    """See `forgeattention.ops.compact`."""
    if base is None:
        raise ValueError("[compact] expected an array that holds the pages; got absolute addresses")
    pages = offsets.shape[0]
    if pages == 0:
        return mx.zeros((0, page_bytes), dtype=mx.uint8)
    (out,) = Launch(
        "compact",
        args.COMPACT_MACROS,
        {"base": base, "offsets": offsets},
        {"out": ((pages, page_bytes), "uint8")},
        {"words": page_bytes // 16},
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
    extra = {"FORGE_WIDTH": width, "FORGE_TYPE": args.TYPES[dtype]}
    if rotated:
        extra["FORGE_ROTATION"] = 0
    found = Launch(
        "decode_pages",
        args.macros(codec, args.DecodePagesParams, **extra),
        {**_pages(table), **k_side.arrays("k"), **v_side.arrays("v")},
        {"k": (shape, dtype), "v": (shape, dtype)},
        {
            **k_side.scalars("k", not rotated),
            **v_side.scalars("v", not rotated),
            "max_pages": table.offsets.shape[1],
            "kv_heads": codec.kv_heads,
            "max_length": table.max_length,
            **_units(codec),
        },
        (-(-table.max_length // PAGE), codec.kv_heads, shape[0]),
        256,
        plans.decode_pages_shared_bytes(codec.format),
    ).run()
    return found[0], found[1]


@lru_cache
def _warn_of_plain_codes() -> None:
    log.warning("CUDA pages are coded without refinement and noise shaping: as readable, less faithful than the CPU's")


def encode(k: Any, v: Any, codec: Codec, out: Any | None, offsets: Any) -> None:
    """See `forgeattention.ops.encode`. Waits for the GPU, to know that every vector could be coded."""
    if codec.spec.refine or codec.shaping is not None:
        _warn_of_plain_codes()
    where = page_places(out, offsets, codec)
    pages = len(where)
    k_side, v_side = _constants_of(codec).encode
    records, bad = Launch(
        "encode",
        args.encode_macros(codec, dtype_of(k)),
        {
            "k": k,
            "v": v,
            "offsets": mx.arange(pages).astype(mx.int64) * codec.page_bytes,
            **k_side.arrays("k"),
            **v_side.arrays("v"),
        },
        {"base": ((pages, codec.page_bytes), "uint8"), "bad": ((1,), "int32")},
        {**k_side.scalars("k"), **v_side.scalars("v"), "tokens": k.shape[1], **_units(codec)},
        (pages, codec.kv_heads, 1),
        256,
        plans.encode_shared_bytes(codec.format),
        zeroed=True,
    ).run()
    if bad.item():
        raise ValueError(f"[encode] expected finite k and v that {codec.spec.scales} scales can hold; got others")
    store_pages(out, records, where)


def _scores_scalars(codec: Codec, table: PageTable, x: Any, side: _Side) -> dict[str, int]:
    group, n = x.shape[1] // codec.kv_heads, x.shape[2]
    return {
        **side.scalars("side"),
        "max_pages": table.offsets.shape[1],
        "kv_heads": codec.kv_heads,
        "group": group,
        "n": n,
        "queries": group * n,
        "blocks": -(-group * n // 8),
        "max_length": table.max_length,
    }


def qk_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    """See `forgeattention.ops.qk_scores`."""
    shape = (*q.shape[:3], table.max_length)
    if 0 in shape:
        return mx.zeros(shape)
    table = some_table(table, q.shape[0], mx)
    side = _constants_of(codec).attend[0]
    scalars = _scores_scalars(codec, table, q, side)
    warps, pages = plans.scores_warps(codec.format), -(-table.max_length // PAGE)
    across = codec.kv_heads * scalars["blocks"]
    groups = min(-(-pages // warps), max(1, 8 * limits().processors // (across * q.shape[0])))
    return Launch(
        "qk_scores",
        plans.scores_macros(codec, dtype_of(q)),
        {"q": q, **_pages(table), **side.arrays("side")},
        {"out": (shape, "float32")},
        {**scalars, "scale": scale, "unit": float(codec.k_codebook.unit)},
        (groups, across, q.shape[0]),
        32 * warps,
    ).run()[0]


def value_sum(p: Any, codec: Codec, table: PageTable) -> Any:
    """See `forgeattention.ops.value_sum`. Weights that are not finite give an undefined result."""
    batch, q_heads, n, _ = p.shape
    if 0 in p.shape:
        return mx.zeros((batch, q_heads, n, codec.head_dim))
    table = some_table(table, batch, mx)
    side = _constants_of(codec).attend[1]
    scalars = _scores_scalars(codec, table, p, side)
    warps, pages = plans.scores_warps(codec.format), -(-table.max_length // PAGE)
    splits = max(1, min(64, pages // (2 * warps)))  # by max_length alone, so that a row's result ignores the batch
    (sums,) = Launch(
        "value_sum",
        plans.scores_macros(codec, "float32"),
        {"q": p, **_pages(table), **side.arrays("side")},
        {"out": ((splits, batch, q_heads, n, codec.head_dim), "float32")},
        {**scalars, "scale": 1.0, "unit": float(codec.v_codebook.unit)},
        (splits, codec.kv_heads * scalars["blocks"], batch),
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
        part = PageTable(table.base, table.offsets[:, first : first + step], lengths, tokens)
        k, v = decode_pages(codec, part, "float16", True)
        valid = (mx.arange(tokens) < lengths[:, None])[:, None]
        o, lse = merge(o, lse, *attention(turned, k, v, valid, 1.0))
    mass = mx.where(lse == -mx.inf, 0.0, 1.0)
    return unpacked_values(o, mass, codec, mx), lse + bias
