"""What ops are told and give besides arrays: where packed and exact tokens lie, scores, thresholds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .arrays import Array


@dataclass(frozen=True, eq=False)
class PageTable:
    """The packed tokens of a batch of sequences in one layer.

    What a table says of its arrays is checked at its first use, and backends keep what they derive of them: the arrays'
    contents may change, but not where they lie. Keep a table as long as it holds; making one anew costs its checks.

    Attributes:
        base: uint8 array that holds the pages and fixes their device, or None when `page_table` holds absolute
            addresses (CPU and CUDA; the owner of the page table keeps the memory alive).
        page_table: int64 [batch, max_pages], byte offset of each page of kv_heads records from the start of `base`.
            Entries past a row's last page are never read.
        lengths: int32 [batch], packed tokens of each row; the last page may be partly used.
        max_length: host upper bound of `lengths`, so that no launch waits for the device.
        uniform: every row has max_length tokens, so that prefill need not read the lengths.
    """

    base: Array | None
    page_table: Array
    lengths: Array
    max_length: int
    uniform: bool = False
    checked: set[Any] = field(default_factory=set, init=False, repr=False)
    """What the table was found to fit."""
    views: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """By backend, its description of the arrays."""


@dataclass(frozen=True, eq=False)
class ExactTokens:
    """The exact tokens of a batch: each row's sinks, then its recent tokens, the newest last.

    Kept and checked as a `PageTable` is.

    Attributes:
        k, v: [batch, kv_heads, capacity, head_dim] in the model's dtype, any strides with a contiguous last axis.
        lengths: int32 [batch], valid tokens of each row, from index 0.
        max_length: host upper bound of `lengths`.
    """

    k: Array
    v: Array
    lengths: Array
    max_length: int
    checked: set[Any] = field(default_factory=set, init=False, repr=False)
    """What the tokens were found to fit."""
    views: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """By backend, its description of the arrays."""

    def grown(self, max_length: int) -> ExactTokens:
        """The same arrays after tokens were appended in place, with what is known of them.

        Args:
            max_length: the new upper bound of `lengths`.

        Raises:
            ValueError: more than the capacity.
        """
        if not 0 <= max_length <= self.k.shape[2]:
            raise ValueError(f"[exact_tokens] expected max_length within {self.k.shape[2]}; got {max_length}")
        new = object.__new__(ExactTokens)
        new.__dict__.update(self.__dict__)
        new.__dict__["max_length"] = max_length
        return new


@dataclass(frozen=True, eq=False)
class Scores:
    """All scores of a step.

    Attributes:
        scores: float32 [batch, q_heads, n, max_length], -inf from each row's length on.
        pages: float32 [batch, q_heads, n, pages, 2], of every 64 tokens the largest score m and the sum of
            exp(score - m); -inf and 0 for a page without tokens.
    """

    scores: Array
    pages: Array


@dataclass(frozen=True, eq=False)
class Threshold:
    """Which tokens each query keeps: those with larger scores, and of those with just this score the ones up to a
    position.

    Attributes:
        score: float32 [batch, q_heads, n]; inf where nothing is kept.
        last: int32 [batch, q_heads, n], position; -1 where nothing is kept.
        kept: int32 [batch, q_heads, n], how many tokens that are.
        dropped: float32 [batch, q_heads, n], the other packed tokens' share of the softmax mass, exact tokens included
            in the whole.
        top: float32 [batch, q_heads, n], the largest score; -inf without packed tokens.
    """

    score: Array
    last: Array
    kept: Array
    dropped: Array
    top: Array
