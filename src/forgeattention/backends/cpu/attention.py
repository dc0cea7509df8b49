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
from .views import address, dtype_code, exact_view, flat, table_view, view_of


def decode_attention(
    q: Any,
    codec: Codec,
    table: PageTable | None,
    exact: ExactTokens | None,
    scale: float,
    causal: bool,
    sink_logits: Any | None,
) -> tuple[Any, Any]:
    return _attention("decode_attention", q, codec, table, exact, scale, causal, sink_logits, None)


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
    dtype: str | None,
) -> tuple[Any, Any]:
    """The result's `dtype` is float32 or, if None, that of q."""
    shape = tuple(q.shape)
    if is_torch(q):
        torch = sys.modules["torch"]
        same = dtype is None and q.is_contiguous()
        out = torch.empty_like(q) if same else torch.empty(shape, dtype=torch.float32 if dtype else q.dtype)
        lse = torch.empty(shape[:3], dtype=torch.float32)
        addresses = out.data_ptr(), lse.data_ptr()
    else:
        out, lse = empty_like(q, shape, dtype or dtype_of(q)), empty_like(q, shape[:3], "float32")
        addresses = address(out), address(lse)
    native.attention(
        op,
        native_codec(codec),
        shape[:3],
        view_of(op, "q", q),
        None if table is None else table_view(op, table),
        None if exact is None else exact_view(op, exact),
        scale,
        causal,
        0 if sink_logits is None else flat(op, "sink_logits", sink_logits),
        dtype_code(out),
        *addresses,
        get_num_threads(),
    )
    return out, lse


def merge(o1: Any, lse1: Any, o2: Any, lse2: Any) -> tuple[Any, Any]:
    return merge_in(sys.modules["torch"] if is_torch(o1) else np, o1, lse1, o2, lse2)
