"""decode_attention, prefill_attention, merge: attention over packed and exact tokens."""

from __future__ import annotations

from typing import Any

from ..codec.codec import Codec
from .arrays import Array, dtype_of, empty_like
from .checks import (
    check_codec,
    check_exact,
    check_index,
    check_packed_queries,
    check_queries,
    check_scale,
    check_table,
    describe,
    fail,
)
from .decorator import op
from .registry import launch
from .table import ExactTokens, PageTable


def _decode_fake(q: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
    return empty_like(q, q.shape, dtype_of(q)), empty_like(q, q.shape[:3], "float32")


@op(fake=_decode_fake)
def decode_attention(
    q: Array,
    codec: Codec,
    table: PageTable | None,
    exact: ExactTokens | None,
    scale: float,
    *,
    causal: bool = True,
    sink_logits: Array | None = None,
    backend: str = "auto",
) -> tuple[Array, Array]:
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
    scale = check_decode(q, codec, table, exact, scale, causal, sink_logits)
    return launch("decode_attention", q, backend)(q, codec, table, exact, scale, causal, sink_logits)


def check_decode(
    q: Array,
    codec: Codec,
    table: PageTable | None,
    exact: ExactTokens | None,
    scale: float,
    causal: bool,
    sink_logits: Array | None,
) -> float:
    """Raises ValueError for arguments that `decode_attention` refuses; gives the scale as a float."""
    op = "decode_attention"
    check_codec(op, codec)
    check_queries(op, q, codec)
    scale = check_scale(op, scale)
    if table is not None:
        check_table(op, table, q.shape[0], q)
    if exact is not None:
        check_exact(op, exact, codec, q)
        if causal and exact.max_length < q.shape[2] and q.shape[0]:
            raise fail(op, f"at least {q.shape[2]} exact tokens, the causal queries' own", exact.max_length)
    elif causal and q.shape[2] > 1:
        raise fail(op, "exact tokens for more than one causal query", None)
    if sink_logits is not None:
        check_index(op, "sink_logits", sink_logits, "float32", (q.shape[1],))
    return scale


def _prefill_fake(q: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
    return empty_like(q, q.shape, "float32"), empty_like(q, q.shape[:3], "float32")


@op(fake=_prefill_fake)
def prefill_attention(
    q: Array, codec: Codec, table: PageTable, scale: float, *, backend: str = "auto"
) -> tuple[Array, Array]:
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
    scale = check_packed_queries("prefill_attention", q, codec, table, scale)
    return launch("prefill_attention", q, backend)(q, codec, table, scale)


def _merge_fake(o1: Any, lse1: Any, o2: Any, lse2: Any) -> tuple[Any, Any]:
    return empty_like(o1, o1.shape, dtype_of(o1)), empty_like(lse1, lse1.shape, dtype_of(lse1))


@op(fake=_merge_fake)
def merge(o1: Array, lse1: Array, o2: Array, lse2: Array, *, backend: str = "auto") -> tuple[Array, Array]:
    """Attention over the union of two disjoint sets of tokens.

    Args:
        o1, o2: [..., head_dim], attention over each set.
        lse1, lse2: [...], natural log-sum-exp of each set's scores; -inf for an empty set.
        backend: "auto" or a backend's name.

    Returns:
        o in o1's dtype and the joint lse.

    Raises:
        ValueError: shapes that do not fit together.
    """
    shape = tuple(o1.shape)
    if tuple(o2.shape) != shape:
        raise fail("merge", f"o2 {list(shape)} like o1", describe(o2))
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        if tuple(lse.shape) != shape[:-1]:
            raise fail("merge", f"{name} {list(shape[:-1])}", describe(lse))
    return launch("merge", o1, backend)(o1, lse1, o2, lse2)
