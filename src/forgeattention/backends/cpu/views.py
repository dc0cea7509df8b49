"""Arrays as the native module is told of them: addresses, dtypes and strides."""

from __future__ import annotations

from typing import Any

from ...ops.arrays import FLOATS, dtype_of, is_torch
from ...ops.checks import fail
from ...ops.table import PageTable

DTYPES = {name: i for i, name in enumerate(FLOATS)}


def address(x: Any) -> int:
    return x.data_ptr() if is_torch(x) else x.__array_interface__["data"][0]


def strides_of(x: Any) -> tuple[int, ...]:
    """Strides in elements."""
    if is_torch(x):
        return x.stride()
    size = x.itemsize
    return tuple(s // size for s in x.strides)


def view_of(op: str, name: str, x: Any) -> tuple[int, int, int, int, int]:
    """(address, dtype, three strides) of an array of three or four axes; a missing first axis has stride 0."""
    strides = strides_of(x)
    if strides[-1] != 1 and x.shape[-1] > 1:
        raise fail(op, f"{name} with a contiguous last axis", f"strides {list(strides)}")
    lead = strides[:-1] if len(strides) == 4 else (0, *strides[:-1])
    return address(x), DTYPES[dtype_of(x)], lead[0], lead[1], lead[2]


def flat(op: str, name: str, x: Any) -> int:
    """Address of an array that must be contiguous."""
    contiguous = x.is_contiguous() if is_torch(x) else x.flags.c_contiguous
    if not contiguous:
        raise fail(op, f"{name} contiguous", f"strides {list(strides_of(x))}")
    return address(x)


def bytes_of(op: str, name: str, x: Any | None) -> tuple[int, int]:
    if x is None:
        return 0, 0
    return flat(op, name, x), x.numel() if is_torch(x) else x.size


def table_view(op: str, table: PageTable) -> tuple[int, int, int, int, int, int]:
    base, size = bytes_of(op, "table.base", table.base)
    strides = strides_of(table.offsets)
    if table.offsets.shape[1] > 1 and strides[1] != 1:
        raise fail(op, "table.offsets with a contiguous last axis", f"strides {list(strides)}")
    lengths = flat(op, "table.lengths", table.lengths)
    return base, size, address(table.offsets), strides[0], lengths, table.max_length
