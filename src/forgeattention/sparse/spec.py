"""What a cache is told about sparse attention."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

log = logging.getLogger("forgeattention")

MIN_CONTEXT = 2**20
"""Packed tokens at which a sparse step was measured to be as fast as a dense one (H100, docs/results.md)."""


@dataclass(frozen=True)
class SparseSpec:
    """Which packed tokens each query of a decode step attends to. Exact tokens are always attended.

    Exactly one of `top_k`, `top_p` and `budgets` is given.

    Attributes:
        top_k: so many tokens of every query head.
        top_p: the fewest tokens that, with the exact ones, carry this share of the softmax mass; the output is then
            within 2 (1 - top_p) max|v| of dense attention.
        budgets: file of `forgeattn calibrate --sparse`, with a number of tokens for every query head.
        fast: choose whole pages of 64 tokens by the score of their mean key and read no others. Then `top_k` is the
            number of tokens read, a multiple of 64, and `top_p` the share of the mass that the read pages are
            estimated to carry; nothing is bounded.
        min_context: attend to everything while a row has fewer packed tokens.

    Raises:
        ValueError: not exactly one rule, a number out of range, or `fast` with `budgets`.
    """

    top_k: int | None = None
    top_p: float | None = None
    budgets: str | os.PathLike[str] | None = None
    fast: bool = False
    min_context: int = MIN_CONTEXT

    def __post_init__(self) -> None:
        given = [name for name in ("top_k", "top_p", "budgets") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"[sparse_spec] expected one of top_k, top_p and budgets; got {given}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"[sparse_spec] expected top_k >= 0; got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p < 1:
            raise ValueError(f"[sparse_spec] expected 0 < top_p < 1; got {self.top_p}")
        if self.fast and self.budgets is not None:
            raise ValueError("[sparse_spec] expected top_k or top_p with fast; got budgets")
        if self.fast and self.top_k is not None and (self.top_k % 64 or self.top_k == 0):
            raise ValueError(f"[sparse_spec] expected top_k a positive multiple of 64 with fast; got {self.top_k}")
        if self.min_context < 0:
            raise ValueError(f"[sparse_spec] expected min_context >= 0; got {self.min_context}")

    def warn_of_min_context(self) -> None:
        """Logs from when on a cache of this spec reads sparsely, unless it is from its first page on."""
        if least := self.min_context:
            log.warning("rows are read whole until they have %d packed tokens (SparseSpec.min_context)", least)

    @classmethod
    def parse(cls, text: str, **options: bool | int) -> SparseSpec:
        """The spec of a command line: "top_k=1024", "top_p=0.995" or "budgets=FILE", and after a comma "fast".

        Raises:
            ValueError: anything else.
        """
        rule, *rest = text.split(",")
        name, _, value = rule.partition("=")
        kinds = {"top_k": int, "top_p": float, "budgets": str}
        if name not in kinds or not value or rest not in ([], ["fast"]):
            raise ValueError(
                f"[sparse_spec] expected top_k=N, top_p=P or budgets=FILE, then perhaps ,fast; got {text!r}"
            )
        try:
            given = {name: kinds[name](value)}
        except ValueError:
            raise ValueError(f"[sparse_spec] expected a number after {name}=; got {value!r}") from None
        return cls(**given, fast=bool(rest), **options)  # type: ignore[arg-type]
