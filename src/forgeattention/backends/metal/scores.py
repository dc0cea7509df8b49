"""Scores of packed keys and sums of packed values by the kernels of kernels/metal."""

from __future__ import annotations

from typing import Any

from ...codec.codec import Codec
from ...codec.spec import PAGE
from ...ops.table import PageTable
from ..mlx.codec import codec_arrays, packed_queries, unpacked_values
from .launch import TILE, Device, Launch, format_template, mlx_device, paged, roomy, rows_per_block, split_count


def launch_scores(kernel: str, q: Any, codec: Codec, table: PageTable, scale: float, device: Device) -> list[Any]:
    """Scores [batch, q_heads, n, max_length] and, from "sparse_scores", the pages' statistics of `ops.Scores`."""
    xp = device.xp
    batch, heads, n, _ = q.shape
    rows, tiles = heads // codec.kv_heads * n, -(-table.max_length // TILE)
    outputs: dict[str, tuple[tuple[int, ...], str]] = {"scores": ((batch, heads, n, table.max_length), "float32")}
    if kernel == "sparse_scores":
        outputs["pages"] = ((batch, heads, n, -(-table.max_length // PAGE), 2), "float32")
    if batch * n * tiles == 0:
        return [xp.zeros(shape, dtype=xp.float32) for shape, _ in outputs.values()]
    block = rows_per_block(rows, codec.format.padded_dim)
    rotated, _, bias = packed_queries(q, codec, scale, xp)
    inputs = {"q": rotated, "bias": roomy(bias, xp), **paged(table, xp), "k_levels": codec_arrays(codec, xp).k_values}
    return device.run(
        Launch(
            kernel,
            {**inputs, "max_length": xp.array(table.max_length, dtype=xp.int32)},
            outputs,
            (tiles, -(-rows // block), batch * codec.kv_heads),
            [*format_template(codec), ("ROWS", block), ("KV_HEADS", codec.kv_heads)],
        )
    )


def qk_scores(q: Any, codec: Codec, table: PageTable, scale: float, device: Device | None = None) -> Any:
    """See `forgeattention.ops.qk_scores`."""
    return launch_scores("qk_scores", q, codec, table, scale, device or mlx_device())[0]


def launch_sums(
    kernel: str, weights: dict[str, Any], codec: Codec, table: PageTable, device: Device, *template: tuple[str, bool]
) -> tuple[Any, Any]:
    """Sums of stored values [batch, q_heads, n, padded_dim] and of their weights [batch, q_heads, n]. The first array
    of `weights` is [batch, q_heads, n, max_length]."""
    batch, heads, n, length = next(iter(weights.values())).shape
    rows, padded = heads // codec.kv_heads * n, codec.format.padded_dim
    splits, block = split_count(-(-length // TILE)), rows_per_block(rows, padded)
    sums, mass = device.run(
        Launch(
            kernel,
            {**weights, **paged(table, device.xp), "v_levels": codec_arrays(codec, device.xp).v_values},
            {
                "sums": ((batch, codec.kv_heads, splits, rows, padded), "float32"),
                "mass": ((batch, codec.kv_heads, splits, rows), "float32"),
            },
            (splits, -(-rows // block), batch * codec.kv_heads),
            [*format_template(codec), ("ROWS", block), ("KV_HEADS", codec.kv_heads), *template],
        )
    )
    return sums.sum(2).reshape(batch, heads, n, padded), mass.sum(2).reshape(batch, heads, n)


def value_sum(p: Any, codec: Codec, table: PageTable, skip: bool = True, device: Device | None = None) -> Any:
    """See `forgeattention.ops.value_sum`. Weights are not checked to be finite: that would wait for the GPU.

    Args:
        p, codec, table: as there.
        skip: leave out pages and groups of 16 tokens whose weights are all zero; else read every page.
        device: what runs the kernel, MLX if None.
    """
    device = device or mlx_device()
    if 0 in p.shape:
        return device.xp.zeros((*p.shape[:3], codec.head_dim), dtype=device.xp.float32)
    return unpacked_values(*launch_sums("value_sum", {"p": p}, codec, table, device, ("SKIP", skip)), codec, device.xp)
