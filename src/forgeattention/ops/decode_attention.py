"""decode_attention: the newest queries over packed and exact tokens."""

from __future__ import annotations

from typing import Any

from ..codec.codec import Codec
from .arrays import traced
from .checks import check_codec, check_exact, check_index, check_queries, check_scale, check_table, fail
from .dispatch import select
from .table import ExactTokens, PageTable


def decode_attention(
    q: Any,
    codec: Codec,
    table: PageTable | None,
    exact: ExactTokens | None,
    scale: float,
    *,
    causal: bool = True,
    sink_logits: Any | None = None,
    backend: str = "auto",
) -> tuple[Any, Any]:
    """Attention of each row's last n tokens over its packed and its exact tokens.

    Args:
        q: [batch, q_heads, n, head_dim], float32, float16 or bfloat16; q_heads a multiple of the codec's kv_heads.
            Query head h reads KV head h // (q_heads / kv_heads).
        codec: the layer's codec; its transforms are applied here.
        table: the packed tokens, all attended; None for none.
        exact: the exact tokens; None for none.
        scale: softmax scale.
        causal: the queries' own keys are the last n exact tokens of their row, and query i does not see the last
            n - 1 - i of them.
        sink_logits: float32 [q_heads], extra logits (not scaled) that take probability mass and give no value.
        backend: "auto" or a backend's name.

    Returns:
        out [batch, q_heads, n, head_dim] in q's dtype and lse, the natural log of the softmax denominator (sink logits
        included), float32 [batch, q_heads, n]; zeros and -inf where nothing is attended. A row's result depends on
        that row alone.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or lengths out of range.
    """
    if traced():
        from . import library

        return library.decode_attention(q, codec, table, exact, scale, causal, sink_logits, backend)
    op = "decode_attention"
    check_codec(op, codec)
    check_queries(op, q, codec)
    scale = check_scale(op, scale)
    if table is not None:
        check_table(op, table, q.shape[0], q)
    if exact is not None:
        check_exact(op, exact, codec, q)
        if causal and exact.max_length < q.shape[2]:
            raise fail(op, f"at least {q.shape[2]} exact tokens, the causal queries' own", exact.max_length)
    elif causal and q.shape[2] > 1:
        raise fail(op, "exact tokens for more than one causal query", None)
    if sink_logits is not None:
        check_index(op, "sink_logits", sink_logits, "float32", (q.shape[1],))
    return select(op, q, backend)(q, codec, table, exact, scale, causal, sink_logits)
