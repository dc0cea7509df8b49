"""The choice of pages by the scores of their means, in MLX's own operations."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from ...codec.codec import Codec
from ...codec.spec import PAGE
from ...ops.table import PageTable


def page_select(
    means: Any, codec: Codec, table: PageTable, most: int, top_p: float | None, exact_lse: Any | None
) -> tuple[Any, Any, Any]:
    batch, _, _, pages = means.shape
    kv_heads = codec.kv_heads
    z = means.reshape(batch, kv_heads, -1, pages) + math.log(PAGE)
    total = mx.logsumexp(z, axis=-1)
    if exact_lse is not None:
        total = mx.logaddexp(total, exact_lse.reshape(total.shape))
    z = z - total[..., None]
    used = mx.broadcast_to(((table.lengths + (PAGE - 1)) // PAGE)[:, None], (batch, kv_heads))
    order = mx.argsort(-z.max(axis=2), axis=-1)[..., :most]
    counts = mx.minimum(used, most)
    if top_p is not None:
        share = mx.exp(z)
        sums = mx.cumsum(mx.take_along_axis(share, mx.broadcast_to(order[:, :, None], share.shape), axis=-1), axis=-1)
        left = share.sum(axis=-1, keepdims=True) - mx.concatenate(
            [mx.zeros_like(sums[..., :1]), sums[..., :-1]], axis=-1
        )
        counts = mx.minimum((left > 1 - top_p).any(axis=2).sum(axis=-1), used)
    taken = mx.arange(most) < counts[..., None]
    read = mx.put_along_axis(mx.zeros((batch, kv_heads, pages), dtype=mx.bool_), order, taken, axis=-1)
    heads_at = codec.format.record_bytes * mx.arange(kv_heads, dtype=mx.int64)[:, None]
    offsets = mx.broadcast_to(table.page_table[:, None, :pages], (batch, kv_heads, pages))
    chosen = mx.take_along_axis(offsets, order, axis=-1) + heads_at
    return chosen, (counts * PAGE).astype(mx.int32), read
