"""Scores of packed keys, weighted sums of packed values and what sparse attention makes of them, by the kernels of
kernels/metal."""

from __future__ import annotations

from typing import Any

from ..codec.codec import Codec
from ..codec.spec import PAGE
from ..ops.merge import merge
from ..ops.sparse import Scores, Threshold
from ..ops.table import PageTable
from .metal_launch import (
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


def _scores(kernel: str, q: Any, codec: Codec, table: PageTable, scale: float, device: Device) -> list[Any]:
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
    inputs = {"q": rotated, "bias": bias, **paged(table), "k_levels": constants(codec, xp).k_values}
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
    return _scores("qk_scores", q, codec, table, scale, device or mlx_device())[0]


def _sums(
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
            {**weights, **paged(table), "v_levels": constants(codec, device.xp).v_values},
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
    return unpacked_values(*_sums("value_sum", {"p": p}, codec, table, device, ("SKIP", skip)), codec, device.xp)


def sparse_scores(q: Any, codec: Codec, table: PageTable, scale: float, device: Device | None = None) -> Scores:
    """See `forgeattention.ops.sparse_scores`."""
    return Scores(*_scores("sparse_scores", q, codec, table, scale, device or mlx_device()))


def page_scores(q: Any, codec: Codec, table: PageTable, scale: float, device: Device | None = None) -> Any:
    """See `forgeattention.ops.page_scores`. Only operations of arrays: the pages' means are a 64th of the keys."""
    xp = (device or mlx_device()).xp
    fmt, (batch, heads, n, _) = codec.format, q.shape
    pages, dim = -(-table.max_length // PAGE), fmt.padded_dim
    if batch * n * pages == 0:
        return xp.zeros((batch, heads, n, pages), dtype=xp.float32)
    rotated, _, bias = packed_queries(q, codec, scale, xp)
    used = xp.arange(pages)[None] < (table.lengths[:, None] + (PAGE - 1)) // PAGE
    first = xp.where(used, table.offsets[:, :pages], 0)[:, None] + fmt.record_bytes * xp.arange(codec.kv_heads)[:, None]
    base: Any = table.base
    mean = base[first[..., None] + (fmt.mean_offset + xp.arange(dim))]
    header = (mean[..., :16].astype(xp.uint16) & 1) << xp.arange(16).astype(xp.uint16)
    mean_scale = header.sum(-1).astype(xp.uint16).view(xp.float16).astype(xp.float32)
    values = mean.view(xp.int8).astype(xp.float32) * mean_scale[..., None]
    of_heads = rotated.reshape(batch, codec.kv_heads, -1, dim) @ values.swapaxes(2, 3)
    scores = of_heads.reshape(batch, heads, n, pages) + bias[..., None]
    return xp.where(used[:, None, None], scores, -xp.inf).astype(xp.float32)


def sparse_threshold(
    scores: Scores, table: PageTable, top_k: Any, top_p: float | None, exact_lse: Any, device: Device | None = None
) -> Threshold:
    """See `forgeattention.ops.sparse_threshold`."""
    device = device or mlx_device()
    xp = device.xp
    shape = scores.scores.shape[:3]
    if exact_lse is None:
        exact_lse = xp.full(shape, -xp.inf, dtype=xp.float32)
    if 0 in scores.scores.shape:
        nothing = xp.full(shape, -xp.inf, dtype=xp.float32)
        last, kept = xp.full(shape, -1, dtype=xp.int32), xp.zeros(shape, dtype=xp.int32)
        return Threshold(-nothing, last, kept, xp.zeros(shape, dtype=xp.float32), nothing)
    if top_k is None or isinstance(top_k, int):
        top_k = xp.full((shape[1],), min(top_k or 0, table.max_length), dtype=xp.int32)
    found = device.run(
        Launch(
            "sparse_threshold",
            {
                "scores": scores.scores,
                "pages": scores.pages,
                "lengths": table.lengths,
                "top_k": top_k,
                "share": xp.array(top_p or 0.0, dtype=xp.float32),
                "exact_lse": exact_lse,
            },
            {
                "score": (shape, "float32"),
                "last": (shape, "int32"),
                "kept": (shape, "int32"),
                "dropped": (shape, "float32"),
                "top": (shape, "float32"),
            },
            (shape[0] * shape[1] * shape[2], 1, 1),
            [("BY_MASS", top_p is not None)],
            (256, 1, 1),
        )
    )
    return Threshold(*found)


def sparse_attention(
    scores: Scores,
    threshold: Threshold,
    codec: Codec,
    table: PageTable,
    other: tuple[Any, Any] | None,
    device: Device | None = None,
) -> tuple[Any, Any]:
    """See `forgeattention.ops.sparse_attention`."""
    device = device or mlx_device()
    xp = device.xp
    shape = scores.scores.shape
    if 0 in shape:
        out, lse = xp.zeros((*shape[:3], codec.head_dim), dtype=xp.float32), xp.full(shape[:3], -xp.inf)
    else:
        weights = {"scores": scores.scores, "pages": scores.pages, "threshold": threshold.score}
        weights |= {"last": threshold.last, "top": threshold.top}
        sums, mass = _sums("sparse_attention", weights, codec, table, device)
        some = mass > 0
        share = xp.where(some, 1 / xp.where(some, mass, 1.0), 0.0).astype(xp.float32)
        lse = xp.where(some, threshold.top + xp.log(xp.where(some, mass, 1.0)), -xp.inf)
        out = unpacked_values(sums * share[..., None], mass * share, codec, xp)
    lse = lse.astype(xp.float32)
    if other is None:
        return out, lse
    o, joined = merge(out, lse, *other)
    return o.astype(other[0].dtype), joined
