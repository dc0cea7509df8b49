"""Arrays as the native module is told of them: addresses, dtypes and strides."""

from __future__ import annotations

from typing import Any

from ...ops.arrays import FLOATS, dtype_of, is_torch
from ...ops.checks import fail
from ...ops.table import ExactTokens, PageTable

DTYPES = {name: i for i, name in enumerate(FLOATS)}
_codes: dict[Any, int] = {}


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
    torch = is_torch(x)
    strides = x.stride() if torch else strides_of(x)
    if strides[-1] != 1 and x.shape[-1] > 1 and 0 not in x.shape:  # an empty array has no strides to speak of
        raise fail(op, f"{name} with a contiguous last axis", f"strides {list(strides)}")
    lead = strides[:-1] if len(strides) == 4 else (0, *strides[:-1])
    return x.data_ptr() if torch else address(x), dtype_code(x), lead[0], lead[1], lead[2]


def dtype_code(x: Any) -> int:
    """The native module's number of an array's dtype."""
    code = _codes.get(x.dtype)
    if code is None:
        code = _codes[x.dtype] = DTYPES[dtype_of(x)]
    return code


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
    """What the native module is told of a table, found out at its first use."""
    view = table.views.get("cpu")
    if view is None:
        base, size = bytes_of(op, "table.base", table.base)
        strides = strides_of(table.page_table)
        if table.page_table.shape[1] > 1 and strides[1] != 1 and table.page_table.shape[0]:
            raise fail(op, "table.page_table with a contiguous last axis", f"strides {list(strides)}")
        lengths = flat(op, "table.lengths", table.lengths)
        view = table.views["cpu"] = base, size, address(table.page_table), strides[0], lengths, table.max_length
    return view


def exact_view(op: str, exact: ExactTokens) -> tuple[Any, Any, int, int]:
    """What the native module is told of exact tokens, found out at their first use."""
    view = exact.views.get("cpu")
    if view is None:
        lengths = flat(op, "exact.lengths", exact.lengths)
        view = exact.views["cpu"] = view_of(op, "exact.k", exact.k), view_of(op, "exact.v", exact.v), lengths
    return *view, exact.max_length
