"""qk_scores: queries against packed keys."""

from __future__ import annotations

from typing import Any

from ..codec.codec import Codec
from .arrays import traced
from .checks import check_codec, check_queries, check_scale, check_table
from .dispatch import select
from .table import PageTable


def qk_scores(q: Any, codec: Codec, table: PageTable, scale: float, *, backend: str = "auto") -> Any:
    """Scaled scores.

    Args:
        q: [batch, q_heads, n, head_dim], float32, float16 or bfloat16.
        codec: the layer's codec.
        table: the packed tokens.
        scale: softmax scale.
        backend: "auto" or a backend's name.

    Returns:
        float32 [batch, q_heads, n, table.max_length], -inf from each row's length on.
    """
    if traced():
        from . import library

        return library.qk_scores(q, codec, table, scale, backend)
    check_codec("qk_scores", codec)
    check_queries("qk_scores", q, codec)
    scale = check_scale("qk_scores", scale)
    check_table("qk_scores", table, q.shape[0], q)
    return select("qk_scores", q, backend)(q, codec, table, scale)
