"""Sparse attention by the kernels of kernels/metal."""

from __future__ import annotations

from typing import Any

from ...codec.codec import Codec
from ...codec.spec import PAGE
from ...ops.table import PageTable, Scores, Threshold
from ..merge import merge_in
from ..mlx.codec import packed_queries, unpacked_values
from .launch import Device, Launch, mlx_device, roomy
from .scores import launch_scores, launch_sums


def sparse_scores(q: Any, codec: Codec, table: PageTable, scale: float, device: Device | None = None) -> Scores:
    """See `forgeattention.ops.sparse_scores`."""
    return Scores(*launch_scores("sparse_scores", q, codec, table, scale, device or mlx_device()))


def page_scores(q: Any, codec: Codec, table: PageTable, scale: float, device: Device | None = None) -> Any:
    """See `forgeattention.ops.page_scores`. Only operations of arrays: the pages' means are a 64th of the keys."""
    xp = (device or mlx_device()).xp
    fmt, (batch, heads, n, _) = codec.format, q.shape
    pages, dim = -(-table.max_length // PAGE), fmt.padded_dim
    if batch * n * pages == 0:
        return xp.zeros((batch, heads, n, pages), dtype=xp.float32)
    rotated, _, bias = packed_queries(q, codec, scale, xp)
    used = xp.arange(pages)[None] < (table.lengths[:, None] + (PAGE - 1)) // PAGE
    first = (
        xp.where(used, table.page_table[:, :pages], 0)[:, None] + fmt.record_bytes * xp.arange(codec.kv_heads)[:, None]
    )
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
                "lengths": roomy(table.lengths, xp),
                "top_k": roomy(top_k, xp),
                "share": xp.array(top_p or 0.0, dtype=xp.float32),
                "exact_lse": roomy(exact_lse, xp),
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
        weights = {"scores": scores.scores, "pages": scores.pages}
        limits = {"threshold": threshold.score, "last": threshold.last, "top": threshold.top}
        weights |= {name: roomy(x, xp) for name, x in limits.items()}
        sums, mass = launch_sums("sparse_attention", weights, codec, table, device)
        some = mass > 0
        share = xp.where(some, 1 / xp.where(some, mass, 1.0), 0.0).astype(xp.float32)
        lse = xp.where(some, threshold.top + xp.log(xp.where(some, mass, 1.0)), -xp.inf)
        out = unpacked_values(sums * share[..., None], mass * share, codec, xp)
    lse = lse.astype(xp.float32)
    if other is None:
        return out, lse
    o, joined = merge_in(xp, out, lse, *other)
    return o.astype(other[0].dtype), joined
