"""Memory sizes as people write them."""

from __future__ import annotations

import re

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_memory(text: str) -> int:
    """Bytes of "16GB" (10^9), "16GiB" (2^30), or a plain number.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"[plan] expected a memory size such as 16GB or 16GiB; got {text!r}")
    return int(float(match[1]) * UNITS[match[2].upper()])
