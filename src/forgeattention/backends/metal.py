"""MLX arrays on Apple GPUs: the ops by the kernels of kernels/metal.

Rotations, centres and dtype casts are MLX operations around the kernels. What is here knows only shapes, so the tests
run the same code with NumPy arrays and an emulator for a device. No Mac was at hand: the kernels have run under that
emulator only, and what their files say of speed is counted, not measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..codec.codec import Codec
from ..codec.spec import PAGE, SCALE_RULES
from ..ops.arrays import dtype_of
from ..ops.table import ExactTokens, PageTable
from .metal_launch import (
    THREADS,
    TILE,
    Device,
    Launch,
    constants,
    format_template,
    mlx_device,
    packed_queries,
    paged,
    rows_per_block,
    split_count,
    unpacked_values,
)
from .metal_scores import page_scores as page_scores
from .metal_scores import qk_scores as qk_scores
from .metal_scores import sparse_attention as sparse_attention
from .metal_scores import sparse_scores as sparse_scores
from .metal_scores import sparse_threshold as sparse_threshold
from .metal_scores import value_sum as value_sum
from .mlx_arrays import page_places, some_exact, some_table, store_pages

LOG2E = 1.4426950408889634


def available() -> tuple[bool, str]:
    """Whether this process can launch Metal kernels, and why."""
    try:
        import mlx.core as mx
    except ImportError as error:
        return False, f"MLX is not installed ({error})"
    if not mx.metal.is_available():
        return False, f"MLX {mx.__version__} without a Metal device"
    return True, f"MLX {mx.__version__} on {mx.metal.device_info()['device_name']}"


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
    c = constants(codec, xp)
    rotated, plain, bias = packed_queries(q, codec, scale * LOG2E, xp)
    table, exact = some_table(table, batch, xp), some_exact(exact, batch, codec, xp)
    splits = max(1, split_count(-(-table.max_length // TILE)))
    block = rows_per_block(rows, padded)
    packed_o, packed_ml, exact_o, exact_ml = device.run(
        Launch(
            "decode_attention",
            {
                "q": rotated,
                "q_exact": plain,
                "bias": bias,
                **paged(table),
                "exact_k": exact.k,
                "exact_v": exact.v,
                "exact_lengths": exact.lengths,
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
                "sinks": sink_logits,
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
    c = constants(codec, xp)
    rotated, _, bias = packed_queries(q, codec, scale * LOG2E, xp)
    inputs = {
        "q": rotated,
        "bias": bias,
        **paged(table),
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


def compact(base: Any | None, offsets: Any, page_bytes: int, device: Device | None = None) -> Any:
    """See `forgeattention.ops.compact`."""
    device = device or mlx_device()
    xp, pages = device.xp, offsets.shape[0]
    if base is None:
        raise ValueError("[compact] expected an array that holds the pages; got absolute addresses")
    if pages == 0:
        return xp.zeros((0, page_bytes), dtype=xp.uint8)
    words = page_bytes // 16
    inputs = {"base": base, "offsets": offsets, "words": xp.array(words, dtype=xp.int32)}
    launch = Launch(
        "compact", inputs, {"out": ((pages, page_bytes), "uint8")}, (-(-words // (4 * THREADS)), pages, 1), []
    )
    return device.run(launch)[0]


def decode_pages(
    codec: Codec, table: PageTable, dtype: str, rotated: bool, device: Device | None = None
) -> tuple[Any, Any]:
    """See `forgeattention.ops.decode_pages`."""
    device = device or mlx_device()
    xp = device.xp
    batch, width = table.lengths.shape[0], codec.format.padded_dim
    c = constants(codec, xp)
    if table.max_length == 0 or batch == 0:
        empty = xp.zeros((batch, codec.kv_heads, table.max_length, width if rotated else codec.head_dim))
        return (empty.astype(getattr(xp, dtype)),) * 2
    stored = dtype if rotated else "float32"
    shape = (batch, codec.kv_heads, table.max_length, width)
    k, v = device.run(
        Launch(
            "decode_pages",
            {
                **paged(table),
                "k_levels": c.k_values,
                "v_levels": c.v_values,
                "max_length": xp.array(table.max_length, dtype=xp.int32),
            },
            {"k": (shape, stored), "v": (shape, stored)},
            (-(-table.max_length // TILE), 1, batch * codec.kv_heads),
            [*format_template(codec), ("T", stored), ("KV_HEADS", codec.kv_heads)],
        )
    )
    if rotated:
        return k, v
    valid = (xp.arange(table.max_length) < table.lengths[:, None])[:, None, :, None]
    out: list[Any] = []
    for y, inverse, mu in ((k, c.k_inverse, c.k_mu), (v, c.v_inverse, c.v_mu)):
        x = y @ inverse.swapaxes(1, 2)
        if mu is not None:
            x = xp.where(valid, x + mu.swapaxes(1, 2), 0.0)
        out.append(x.astype(getattr(xp, dtype)))
    return out[0], out[1]


def encode(k: Any, v: Any, codec: Codec, out: Any | None, offsets: Any, device: Device | None = None) -> None:
    """See `forgeattention.ops.encode`. Waits for the GPU, to know that every vector could be coded."""
    device = device or mlx_device()
    xp = device.xp
    where = page_places(out, offsets, codec)
    c = constants(codec, xp)
    y = []
    for x, forward, mu in ((k, c.k_forward, c.k_mu), (v, c.v_forward, c.v_mu)):
        x = x.astype(xp.float32)
        y.append((x if mu is None else x - mu.swapaxes(1, 2)) @ forward)
    spec, pages = codec.spec, len(where)
    shaped = codec.shaping is not None
    work = (pages, codec.kv_heads, PAGE, codec.format.padded_dim) if shaped else (8,)
    records, status, *_ = device.run(
        Launch(
            "encode",
            {
                "y_k": y[0],
                "y_v": y[1],
                "k_levels": c.k_values,
                "v_levels": c.v_values,
                "k_factor": c.k_factor,
                "k_weight": c.k_weight,
                "orders": c.orders,
            },
            {
                "records": ((pages, codec.kv_heads, codec.format.record_bytes), "uint8"),
                "status": ((pages, codec.kv_heads), "uint32"),
                "errors": (work, "float32"),
                "codes": (work, "uint8"),
            },
            (pages, codec.kv_heads, 1),
            [
                *format_template(codec),
                ("K_RULE", SCALE_RULES.index(spec.k_scale_rule)),
                ("V_RULE", SCALE_RULES.index(spec.v_scale_rule)),
                ("KEY_MEAN", spec.key_mean),
                ("REFINE", spec.refine),
                ("SHAPED", shaped),
            ],
        )
    )
    faults = int(np.bitwise_or.reduce(np.asarray(status), axis=None))
    if faults & 1:
        raise ValueError("[encode] expected finite k and v; got NaN or infinity")
    if faults:
        raise ValueError(f"[encode] expected vectors that {spec.scales} scales can hold; got larger ones")
    store_pages(out, records, where)
