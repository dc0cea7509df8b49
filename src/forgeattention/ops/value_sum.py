"""value_sum: weighted sums of packed values."""

from __future__ import annotations

from typing import Any

from ..codec.codec import Codec
from .arrays import device_of, dtype_of, traced
from .checks import check_codec, check_table, describe, fail
from .dispatch import select
from .table import PageTable


def value_sum(p: Any, codec: Codec, table: PageTable, *, backend: str = "auto") -> Any:
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
    if traced():
        from . import library

        return library.value_sum(p, codec, table, backend)
    op = "value_sum"
    check_codec(op, codec)
    if not device_of(p) or dtype_of(p) != "float32" or len(p.shape) != 4:
        raise fail(op, "p float32 [batch, q_heads, n, max_length]", describe(p))
    if p.shape[1] == 0 or p.shape[1] % codec.kv_heads:
        raise fail(op, f"q_heads a multiple of {codec.kv_heads} kv_heads", p.shape[1])
    check_table(op, table, p.shape[0], p)
    if p.shape[3] != table.max_length:
        raise fail(op, f"p with {table.max_length} weights per query, the table's max_length", p.shape[3])
    return select(op, p, backend)(p, codec, table)
