"""prefill_attention: many queries over packed tokens."""

from __future__ import annotations

from typing import Any

from ..codec.codec import Codec
from .arrays import traced
from .checks import check_codec, check_queries, check_scale, check_table
from .dispatch import select
from .table import PageTable


def prefill_attention(
    q: Any, codec: Codec, table: PageTable, scale: float, *, backend: str = "auto"
) -> tuple[Any, Any]:
    """Attention of a chunk of queries over the packed tokens before it, all of them attended.

    The caller joins the result with the chunk's causal attention to itself by `merge`.

    Args:
        q: [batch, q_heads, n, head_dim], float32, float16 or bfloat16.
        codec: the layer's codec.
        table: the packed tokens.
        scale: softmax scale.
        backend: "auto" or a backend's name.

    Returns:
        out float32 [batch, q_heads, n, head_dim] and lse float32 [batch, q_heads, n] (natural log); zeros and -inf for
        a row without packed tokens.
    """
    if traced():
        from . import library

        return library.prefill_attention(q, codec, table, scale, backend)
    check_codec("prefill_attention", codec)
    check_queries("prefill_attention", q, codec)
    scale = check_scale("prefill_attention", scale)
    check_table("prefill_attention", table, q.shape[0], q)
    return select("prefill_attention", q, backend)(q, codec, table, scale)
