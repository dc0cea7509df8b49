"""qk_scores, value_sum: scores of packed keys and weighted sums of packed values."""

from __future__ import annotations

from typing import Any

from ..codec.codec import Codec
from .arrays import Array, device_of, dtype_of, empty_like
from .checks import check_codec, check_packed_queries, check_table, describe, fail
from .decorator import op
from .registry import launch
from .table import PageTable


def _qk_fake(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    return empty_like(q, (*q.shape[:3], table.max_length), "float32")


@op(fake=_qk_fake)
def qk_scores(q: Array, codec: Codec, table: PageTable, scale: float, *, backend: str = "auto") -> Array:
    """Scaled scores of all packed keys.

    Args:
        q: [batch, q_heads, n, head_dim], float32, float16 or bfloat16.
        codec: the layer's codec.
        table: the packed tokens.
        scale: softmax scale.
        backend: "auto" or a backend's name.

    Returns:
        float32 [batch, q_heads, n, table.max_length], -inf from each row's length on.
    """
    scale = check_packed_queries("qk_scores", q, codec, table, scale)
    return launch("qk_scores", q, backend)(q, codec, table, scale)


def _sum_fake(p: Any, codec: Codec, table: PageTable) -> Any:
    return empty_like(p, (*p.shape[:3], codec.head_dim), "float32")


@op(fake=_sum_fake)
def value_sum(p: Array, codec: Codec, table: PageTable, *, backend: str = "auto") -> Array:
    """Sums of values with given weights.

    Args:
        p: float32 [batch, q_heads, n, table.max_length], finite weights of any sign; read up to each row's length.
        codec: the layer's codec.
        table: the packed tokens.
        backend: "auto" or a backend's name.

    Returns:
        float32 [batch, q_heads, n, head_dim].

    Raises:
        ValueError: a wrong shape or dtype, a weight that is not finite.
    """
    op = "value_sum"
    check_codec(op, codec)
    if not device_of(p) or dtype_of(p) != "float32" or len(p.shape) != 4:
        raise fail(op, "p float32 [batch, q_heads, n, max_length]", describe(p))
    if p.shape[1] == 0 or p.shape[1] % codec.kv_heads:
        raise fail(op, f"q_heads a multiple of {codec.kv_heads} kv_heads", p.shape[1])
    check_table(op, table, p.shape[0], p)
    if p.shape[3] != table.max_length:
        raise fail(op, f"p with {table.max_length} weights per query, the table's max_length", p.shape[3])
    return launch(op, p, backend)(p, codec, table)
