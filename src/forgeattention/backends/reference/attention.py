"""Attention over packed and exact tokens by the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import reference
from ...codec.codec import Codec
from ...ops.arrays import dtype_of, from_numpy, to_numpy
from ...ops.table import ExactTokens, PageTable
from ...reference.attention import attention
from .rows import pages_of_row


def decode_attention(
    q: Any,
    codec: Codec,
    table: PageTable | None,
    exact: ExactTokens | None,
    scale: float,
    causal: bool,
    sink_logits: Any | None,
) -> tuple[Any, Any]:
    q64 = to_numpy(q).astype(np.float64)
    out, lse = np.zeros(q64.shape), np.full(q64.shape[:3], -np.inf)
    empty = np.zeros((0, codec.kv_heads, codec.format.record_bytes), np.uint8)
    for row in range(q64.shape[0]):
        pages, length = (empty, 0) if table is None else pages_of_row("decode_attention", codec, table, row)
        k = v = None
        if exact is not None:
            n = int(to_numpy(exact.lengths)[row])
            if not 0 <= n <= exact.max_length:
                raise ValueError(f"[decode_attention] expected exact lengths within {exact.max_length}; got {n}")
            k, v = to_numpy(exact.k)[row, :, :n], to_numpy(exact.v)[row, :, :n]
        out[row], lse[row] = reference.decode_attention(q64[row], pages, length, codec, scale, k, v, causal)
    if sink_logits is not None:
        extra = np.broadcast_to(to_numpy(sink_logits).astype(np.float64)[None, :, None], lse.shape)
        out, lse = reference.merge([(out, lse), (np.zeros_like(out), extra)])
    return from_numpy(out, q, dtype_of(q)), from_numpy(lse, q, "float32")


def prefill_attention(q: Any, codec: Codec, table: PageTable, scale: float) -> tuple[Any, Any]:
    q64 = to_numpy(q).astype(np.float64)
    out, lse = np.zeros(q64.shape), np.full(q64.shape[:3], -np.inf)
    for row in range(q64.shape[0]):
        pages, length = pages_of_row("prefill_attention", codec, table, row)
        if length:
            k, v = reference.decode_pages(pages, codec)
            out[row], lse[row] = attention(q64[row], k[:, :length], v[:, :length], scale)
    return from_numpy(out, q, "float32"), from_numpy(lse, q, "float32")


def merge(o1: Any, lse1: Any, o2: Any, lse2: Any) -> tuple[Any, Any]:
    parts = [(to_numpy(o).astype(np.float64), to_numpy(lse).astype(np.float64)) for o, lse in ((o1, lse1), (o2, lse2))]
    o, lse = reference.merge(parts)
    return from_numpy(o, o1, dtype_of(o1)), from_numpy(lse, lse1, dtype_of(lse1))
