"""Scores of packed keys and sums of packed values by the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import reference
from ...codec.codec import Codec
from ...ops.arrays import from_numpy, to_numpy
from ...ops.table import PageTable
from .rows import pages_of_row


def qk_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    q64 = to_numpy(q).astype(np.float64)
    out = np.full((*q64.shape[:3], table.max_length), -np.inf)
    for row in range(q64.shape[0]):
        pages, length = pages_of_row("qk_scores", codec, table, row)
        if length:
            out[row, ..., :length] = reference.qk_scores(q64[row], pages, length, codec, scale)
    return from_numpy(out, q, "float32")


def value_sum(p: Any, codec: Codec, table: PageTable) -> Any:
    p64 = to_numpy(p).astype(np.float64)
    out = np.zeros((*p64.shape[:3], codec.head_dim))
    for row in range(p64.shape[0]):
        pages, length = pages_of_row("value_sum", codec, table, row)
        weights = p64[row, ..., :length]
        if not np.isfinite(weights).all():
            raise ValueError("[value_sum] expected finite weights; got NaN or infinity")
        if length:
            out[row] = reference.value_sum(weights, pages, codec)
    return from_numpy(out, p, "float32")
