"""compact: scattered pages, moved together."""

from __future__ import annotations

from typing import Any

from .arrays import dtype_of
from .checks import check_index, describe, fail
from .dispatch import select


def compact(base: Any | None, offsets: Any, page_bytes: int, *, backend: str = "auto") -> Any:
    """Copies pages side by side, byte for byte: nothing is coded again.

    Args:
        base: uint8 array that holds the pages, or None when `offsets` are absolute addresses (CPU and CUDA).
        offsets: int64 [pages], byte offset of each page from the start of `base`.
        page_bytes: bytes of a page, a multiple of 16.
        backend: "auto" or a backend's name.

    Returns:
        uint8 [pages, page_bytes] in the framework of `offsets`.

    Raises:
        ValueError: wrong shapes or dtypes, pages outside of `base` (off the CPU this is not looked for).
    """
    check_index("compact", "offsets", offsets, "int64", ("pages",))
    if page_bytes < 16 or page_bytes % 16:
        raise fail("compact", "page_bytes a positive multiple of 16", page_bytes)
    if base is not None and dtype_of(base) != "uint8":
        raise fail("compact", "base uint8", describe(base))
    return select("compact", offsets, backend)(base, offsets, page_bytes)
