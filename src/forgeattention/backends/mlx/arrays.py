"""What the backends that launch kernels on MLX arrays have in common. The array module is an argument: the tests run
Metal's launches on NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...codec.codec import Codec
from ...ops.table import ExactTokens, PageTable


def some_table(table: PageTable | None, batch: int, xp: Any) -> PageTable:
    """The table, or one without tokens.

    Raises:
        ValueError: its pages are addresses.
    """
    if table is not None and table.base is None:
        raise ValueError("[mlx] expected a page table with a base array; got absolute addresses")
    if table is not None:
        return table
    nothing = xp.zeros((batch,), dtype=xp.int32)
    return PageTable(xp.zeros((16,), dtype=xp.uint8), xp.zeros((batch, 1), dtype=xp.int64), nothing, 0)


def some_exact(exact: ExactTokens | None, batch: int, codec: Codec, xp: Any) -> ExactTokens:
    """The exact tokens, or none as float32 arrays."""
    if exact is not None:
        return exact
    nothing = xp.zeros((batch, codec.kv_heads, 1, codec.head_dim), dtype=xp.float32)
    return ExactTokens(nothing, nothing, xp.zeros((batch,), dtype=xp.int32), 0)


def page_places(out: Any | None, offsets: Any, codec: Codec) -> list[int]:
    """Where `encode` puts its pages.

    Raises:
        ValueError: no array takes them, or a page would lie outside of it.
    """
    if out is None:
        raise ValueError("[encode] expected an array that takes the pages; got absolute addresses")
    where = [int(o) for o in np.asarray(offsets)]
    if where and not (min(where) >= 0 and max(where) + codec.page_bytes <= out.size):
        raise ValueError(f"[encode] expected offsets within {out.size} bytes; got {max(where)}")
    return where


def store_pages(out: Any, records: Any, where: list[int]) -> None:
    """Writes pages [n, ...] of bytes to their places in `out`, one run of neighbours at a time."""
    pages = records.reshape(len(where), -1)
    size = pages.shape[1]
    flat = out if out.ndim == 1 else out.reshape(-1)
    first = 0
    for last in range(1, len(where) + 1):
        if last == len(where) or where[last] != where[last - 1] + size:
            at = where[first]
            flat[at : at + (last - first) * size] = pages[first:last].reshape(-1)
            first = last
    if out.ndim != 1:
        out[...] = flat.reshape(out.shape)
