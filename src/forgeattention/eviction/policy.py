"""Which tokens are given up. A policy is one small class with `choose`; sizes and budgets are the round's business.

V1, V2 and V3 are those of TriAttention V3 (turboquant_plus, docs/papers/triattention-v3.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

FULL_ATTENTION = ("full_attention", "attention", "global_attention", "full")


@dataclass(frozen=True, eq=False)
class Items:
    """What a round may give up: tokens, or pages of tokens, oldest first.

    Attributes:
        starts: position of each item's first token, ascending, [n].
        scores: the larger the better worth keeping, [n].
        size: tokens of an item.
        length: tokens that the sequence has come to.
    """

    starts: I64
    scores: F64
    size: int
    length: int


@dataclass(frozen=True)
class Policy:
    """Gives up the items of the lowest score (TriAttention V1: a global sort).

    Attributes:
        retention: share of the sequence's tokens that is kept, in (0, 1].
    """

    retention: float = 0.9
    scored: ClassVar[bool] = True
    """Whether `Items.scores` matters."""

    def __post_init__(self) -> None:
        if not 0 < self.retention <= 1:
            raise ValueError(f"[eviction] expected a retention in (0, 1]; got {self.retention}")

    def share(self, length: int) -> float:
        """Share of a sequence of `length` tokens that is kept, before hybrid scaling."""
        return self.retention

    def choose(self, items: Items, count: int) -> I64:
        """Indices of at most `count` items to give up."""
        return np.argsort(items.scores, kind="stable")[:count]


V1 = Policy


@dataclass(frozen=True)
class V2(Policy):
    """Splits the sequence into segments of equal length, each of which gives up items in proportion to what it holds;
    what rounding leaves over is taken by score from all."""

    segments: int = 8

    def choose(self, items: Items, count: int) -> I64:
        n = len(items.starts)
        if n == 0 or count <= 0:
            return np.zeros(0, np.int64)
        first, last = items.starts[0], items.starts[-1]
        segment = (items.starts - first) * self.segments // (last - first + items.size)
        order = np.argsort(items.scores, kind="stable")
        gone = np.zeros(n, np.bool_)
        for s in range(self.segments):
            own = order[segment[order] == s]
            gone[own[: count * len(own) // n]] = True
        rest = order[~gone[order]]
        gone[rest[: count - int(gone.sum())]] = True
        return np.flatnonzero(gone)


@dataclass(frozen=True)
class V3(V2):
    """V2 that never gives up the first `prefix` and the newest `window` tokens."""

    prefix: int = 128
    window: int = 128

    def choose(self, items: Items, count: int) -> I64:
        free = np.flatnonzero((items.starts >= self.prefix) & (items.starts + items.size <= items.length - self.window))
        part = Items(items.starts[free], items.scores[free], items.size, items.length)
        return free[super().choose(part, min(count, len(free)))]


@dataclass(frozen=True)
class Random(Policy):
    """Any items, drawn from a seed: what a policy must beat."""

    seed: int = 0
    scored: ClassVar[bool] = False

    def choose(self, items: Items, count: int) -> I64:
        draw = np.random.default_rng([self.seed, items.length])
        return draw.permutation(len(items.starts))[:count]


@dataclass(frozen=True)
class Recency(Policy):
    """The oldest items."""

    scored: ClassVar[bool] = False

    def choose(self, items: Items, count: int) -> I64:
        return np.arange(min(count, len(items.starts)))


@dataclass(frozen=True)
class AttentionWindow(Recency):
    """A sliding window: all but the newest `tokens` (and the exact first ones) go."""

    retention: float = 1.0
    tokens: int = 4096

    def share(self, length: int) -> float:
        return min(1.0, self.tokens / max(length, 1))


POLICIES: dict[str, type[Policy]] = {
    "v1": V1,
    "v2": V2,
    "v3": V3,
    "random": Random,
    "recency": Recency,
    "window": AttentionWindow,
}


def attention_fraction(config: Any) -> float:
    """Full-attention layers over all layers, from a model's config (1 where it names no layer types). Sliding-window,
    linear-attention and recurrent layers are not evicted from."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        full = sum(kind in FULL_ATTENTION for kind in kinds)
        return full / len(kinds)
    every = getattr(config, "full_attention_interval", None)
    if every:
        return (config.num_hidden_layers // every) / config.num_hidden_layers
    return 1.0


def effective(share: float, fraction: float) -> float:
    """The share kept in a hybrid, whose few attention layers give up less (TriAttention V3's hybrid recipe)."""
    return 1 - (1 - share) * fraction


def excess(held: int, length: int, share: float, size: int) -> int:
    """How many items of `size` tokens are over the budget of a sequence that holds `held` of `length` tokens."""
    return max(0, math.ceil((held - share * length) / size - 1e-9)) if share < 1 else 0
