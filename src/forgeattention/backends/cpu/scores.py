"""Scores of packed keys and sums of packed values by the native CPU kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...codec.codec import Codec
from ...ops.arrays import empty_like, is_torch
from ...ops.table import PageTable
from ...ops.threads import get_num_threads
from .native import native, native_codec
from .views import address, table_view, view_of


def qk_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    shape = tuple(q.shape[:3])
    out = empty_like(q, (*shape, table.max_length), "float32")
    view = table_view("qk_scores", table)
    queries = view_of("qk_scores", "q", q)
    native.qk_scores(native_codec(codec), shape, queries, view, scale, address(out), get_num_threads())
    return out


def value_sum(p: Any, codec: Codec, table: PageTable) -> Any:
    shape = tuple(p.shape[:3])
    p = p.contiguous() if is_torch(p) else np.ascontiguousarray(p)
    out = empty_like(p, (*shape, codec.head_dim), "float32")
    view = table_view("value_sum", table)
    native.value_sum(native_codec(codec), shape, address(p), view, address(out), get_num_threads())
    return out
