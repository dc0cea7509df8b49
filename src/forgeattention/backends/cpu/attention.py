"""Attention over packed and exact tokens by the native CPU kernels."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ...codec.codec import Codec
from ...ops.arrays import dtype_of, empty_like, is_torch
from ...ops.table import ExactTokens, PageTable
from ...ops.threads import get_num_threads
from ..merge import merge_in
from .native import native, native_codec
from .views import DTYPES, address, flat, table_view, view_of


def decode_attention(
    q: Any,
    codec: Codec,
    table: PageTable | None,
    exact: ExactTokens | None,
    scale: float,
    causal: bool,
    sink_logits: Any | None,
) -> tuple[Any, Any]:
    return _attention("decode_attention", q, codec, table, exact, scale, causal, sink_logits, dtype_of(q))


def prefill_attention(q: Any, codec: Codec, table: PageTable, scale: float) -> tuple[Any, Any]:
    return _attention("prefill_attention", q, codec, table, None, scale, False, None, "float32")


def _attention(
    op: str,
    q: Any,
    codec: Codec,
    table: PageTable | None,
    exact: ExactTokens | None,
    scale: float,
    causal: bool,
    sink_logits: Any | None,
    dtype: str,
) -> tuple[Any, Any]:
    shape = tuple(q.shape)
    out, lse = empty_like(q, shape, dtype), empty_like(q, shape[:3], "float32")
    exact_view = None
    if exact is not None:
        lengths = flat(op, "exact.lengths", exact.lengths)
        exact_view = (view_of(op, "exact.k", exact.k), view_of(op, "exact.v", exact.v), lengths, exact.max_length)
    native.attention(
        op,
        native_codec(codec),
        shape[:3],
        view_of(op, "q", q),
        None if table is None else table_view(op, table),
        exact_view,
        scale,
        causal,
        0 if sink_logits is None else flat(op, "sink_logits", sink_logits),
        DTYPES[dtype],
        address(out),
        address(lse),
        get_num_threads(),
    )
    return out, lse


def merge(o1: Any, lse1: Any, o2: Any, lse2: Any) -> tuple[Any, Any]:
    return merge_in(sys.modules["torch"] if is_torch(o1) else np, o1, lse1, o2, lse2)
