"""What the oracle is given: one row of a batch at a time, copied."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from ...codec.codec import Codec
from ...codec.spec import PAGE
from ...ops.arrays import to_numpy
from ...ops.table import PageTable

U8 = NDArray[np.uint8]


def pages_of_row(op: str, codec: Codec, table: PageTable, row: int) -> tuple[U8, int]:
    """Pages [n, kv_heads, record_bytes] of a row, copied, and the row's length."""
    length = int(to_numpy(table.lengths)[row])
    if not 0 <= length <= table.max_length:
        raise ValueError(f"[{op}] expected lengths within max_length {table.max_length}; got {length}")
    count = -(-length // PAGE)
    offsets = to_numpy(table.page_table)[row, :count]
    size = codec.page_bytes
    if table.base is None:
        parts = [np.frombuffer(ctypes.string_at(int(o), size), np.uint8) for o in offsets]
    else:
        flat = to_numpy(table.base).reshape(-1)
        if count and not (offsets.min() >= 0 and offsets.max() + size <= flat.size):
            raise ValueError(f"[{op}] expected page offsets within {flat.size} bytes; got {int(offsets.max())}")
        parts = [flat[o : o + size] for o in offsets]
    pages = np.stack(parts) if parts else np.zeros((0, size), np.uint8)
    return pages.reshape(count, codec.kv_heads, codec.format.record_bytes), length
