"""What an op is told about where packed and exact tokens lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class PageTable:
    """The packed tokens of a batch of sequences in one layer.

    Attributes:
        base: uint8 array that holds the pages and fixes their device, or None when `offsets` are absolute addresses
            (CPU and CUDA; the owner of the page table keeps the memory alive).
        offsets: int64 [batch, max_pages], byte offset of each page of kv_heads records from the start of `base`.
            Entries past a row's last page are never read.
        lengths: int32 [batch], packed tokens of each row; the last page may be partly used.
        max_length: host upper bound of `lengths`, so that no launch waits for the device.
        uniform: every row has max_length tokens, so that prefill need not read the lengths.
    """

    base: Any | None
    offsets: Any
    lengths: Any
    max_length: int
    uniform: bool = False
    checked: list[tuple[Any, str]] = field(default_factory=list, init=False, repr=False)
    """Rows and device that an op found this table to fit: a table is used by many calls and never changes."""


@dataclass(frozen=True, eq=False)
class ExactTokens:
    """The exact tokens of a batch: each row's sinks, then its recent tokens, the newest last.

    Attributes:
        k, v: [batch, kv_heads, capacity, head_dim] in the model's dtype, any strides with a contiguous last axis.
        lengths: int32 [batch], valid tokens of each row, from index 0.
        max_length: host upper bound of `lengths`.
    """

    k: Any
    v: Any
    lengths: Any
    max_length: int
