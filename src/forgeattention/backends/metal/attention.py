"""Attention over packed and exact tokens by the kernels of kernels/metal."""

from __future__ import annotations

from typing import Any

from ...codec.codec import Codec
from ...ops.arrays import dtype_of
from ...ops.table import ExactTokens, PageTable
from ..mlx.arrays import some_exact, some_table
from ..mlx.codec import codec_arrays, packed_queries, unpacked_values
from .launch import FEWEST, TILE, Device, Launch, format_template, mlx_device, paged, roomy, rows_per_block, split_count

LOG2E = 1.4426950408889634


def decode_attention(
    q: Any,
    codec: Codec,
    table: PageTable | None,
    exact: ExactTokens | None,
    scale: float,
    causal: bool,
    sink_logits: Any | None,
    device: Device | None = None,
) -> tuple[Any, Any]:
    """See `forgeattention.ops.decode_attention`."""
    device = device or mlx_device()
    xp = device.xp
    batch, heads, n, dim = q.shape
    kv_heads, rows = codec.kv_heads, heads // codec.kv_heads * n
    padded = codec.format.padded_dim
    c = codec_arrays(codec, xp)
    rotated, plain, bias = packed_queries(q, codec, scale * LOG2E, xp)
    table, exact = some_table(table, batch, xp), some_exact(exact, batch, codec, xp)
    # Splits past a row's own are empty; as many as give `packed_ml` its fewest elements.
    fewest = -(-FEWEST // (batch * kv_heads * rows * 2))
    splits = max(fewest, split_count(-(-table.max_length // TILE)))
    block = rows_per_block(rows, padded)
    packed_o, packed_ml, exact_o, exact_ml = device.run(
        Launch(
            "decode_attention",
            {
                "q": rotated,
                "q_exact": plain,
                "bias": roomy(bias, xp),
                **paged(table, xp),
                "exact_k": exact.k,
                "exact_v": exact.v,
                "exact_lengths": roomy(exact.lengths, xp),
                "k_levels": c.k_values,
                "v_levels": c.v_values,
            },
            {
                "packed_o": ((batch, kv_heads, splits, rows, padded), "float32"),
                "packed_ml": ((batch, kv_heads, splits, rows, 2), "float32"),
                "exact_o": ((batch, kv_heads, 4, rows, dim), "float32"),
                "exact_ml": ((batch, kv_heads, 4, rows, 2), "float32"),
            },
            (1 + splits, -(-rows // block), batch * kv_heads),
            [*format_template(codec), ("T", dtype_of(exact.k)), ("DIM", dim), ("ROWS", block), ("CAUSAL", causal)],
        )
    )
    if sink_logits is None:
        sink_logits = xp.full((heads,), -xp.inf, dtype=xp.float32)
    of_packed, of_exact, mass, lse = device.run(
        Launch(
            "merge_attention",
            {
                "packed_o": packed_o,
                "packed_ml": packed_ml,
                "exact_o": exact_o,
                "exact_ml": exact_ml,
                "sinks": roomy(sink_logits, xp),
            },
            {
                "out_packed": ((batch, heads, n, padded), "float32"),
                "out_exact": ((batch, heads, n, dim), "float32"),
                "mass": ((batch, heads, n), "float32"),
                "lse": ((batch, heads, n), "float32"),
            },
            (1, rows, batch * kv_heads),
            [("D", padded), ("DIM", dim), ("N", n)],
            (padded, 1, 1),
        )
    )
    return (unpacked_values(of_packed, mass, codec, xp) + of_exact).astype(q.dtype), lse


def prefill_attention(
    q: Any, codec: Codec, table: PageTable, scale: float, device: Device | None = None
) -> tuple[Any, Any]:
    """See `forgeattention.ops.prefill_attention`."""
    device = device or mlx_device()
    xp = device.xp
    batch, heads, n, _ = q.shape
    rows, padded = heads // codec.kv_heads * n, codec.format.padded_dim
    if batch == 0 or n == 0:
        return xp.zeros(q.shape, dtype=xp.float32), xp.zeros(q.shape[:3], dtype=xp.float32)
    c = codec_arrays(codec, xp)
    rotated, _, bias = packed_queries(q, codec, scale * LOG2E, xp)
    inputs = {
        "q": rotated,
        "bias": roomy(bias, xp),
        **paged(table, xp),
        "k_levels": c.k_levels,
        "v_levels": c.v_levels,
        "units": c.units,
    }
    o, lse = device.run(
        Launch(
            "prefill_attention",
            inputs,
            {"o": ((batch, heads, n, padded), "float32"), "lse": ((batch, heads, n), "float32")},
            (-(-rows // 32), batch * codec.kv_heads, 1),
            [*format_template(codec), ("KV_HEADS", codec.kv_heads)],
        )
    )
    mass = xp.where(lse == -xp.inf, 0.0, 1.0).astype(xp.float32)
    return unpacked_values(o, mass, codec, xp), lse
