"""Codebooks: the int8 levels that codes stand for.

A stored element is worth scale * unit * level; level is an int8, and unit makes the codebook one for unit variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .spec import Code, check_code

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Codebook:
    """Levels of one code.

    Attributes:
        bits: stored bits per element.
        states: states of the trellis, 1 for a scalar code.
        levels: 2^bits int8 levels in ascending order for a scalar code, 2^(bits + 1) for a trellis code.
        unit: what level 1 is worth for a vector of unit variance.
    """

    bits: int
    states: int
    levels: tuple[int, ...]
    unit: float

    @property
    def values(self) -> F64:
        """The levels as float64 for unit variance, [levels]."""
        return np.array(self.levels, np.float64) * self.unit


def lloyd_max(levels: int, iterations: int = 20000, tolerance: float = 1e-13) -> F64:
    """The quantiser of N(0, 1) with least squared error (Lloyd 1982, Max 1960), by the exact centroid iteration.

    Args:
        levels: number of levels.
        iterations: at most so many rounds.
        tolerance: ends when no level moves further.

    Returns:
        [levels] float64, ascending, symmetric.
    """
    x = np.linspace(-2.0, 2.0, levels)
    for _ in range(iterations):
        edge = np.concatenate([[-np.inf], (x[1:] + x[:-1]) / 2, [np.inf]])
        density = np.exp(-edge * edge / 2) / math.sqrt(2 * math.pi)
        mass = np.array(
            [0.5 * (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2))) for a, b in zip(edge, edge[1:])]
        )
        new = (density[:-1] - density[1:]) / mass
        new = (new - new[::-1]) / 2
        if np.abs(new - x).max() < tolerance:
            return new
        x = new
    return x


def to_int8(values: F64) -> tuple[tuple[int, ...], float]:
    """Symmetric values rounded to int8 levels with the largest at 127, and the unit that scales them back."""
    unit = float(np.abs(values).max() / 127)
    return tuple(int(v) for v in np.rint(values / unit)), unit


# Generators (h1, h0) of the level bits c1, c0 from the path bits u_t, u_(t-1), ...: bit i of a generator taps u_(t-i)
# (Ungerboeck 1982, table I; Marcellin and Fischer 1990 for quantisation).
TRELLIS_TAPS = {4: (0b101, 0b010), 8: (0b1011, 0b0100)}


def trellis_step(state: int, u: int, states: int) -> tuple[int, int]:
    """One step of the trellis: (next state, subset c1 c0) after path bit `u`. A state is the last path bits, newest
    in bit 0."""
    register = state << 1 | u
    c1, c0 = ((register & taps).bit_count() & 1 for taps in TRELLIS_TAPS[states])
    return register & (states - 1), c1 << 1 | c0


def trellis_levels(codes: NDArray[np.uint8], bits: int, states: int) -> NDArray[np.uint8]:
    """Level index of each code on the paths [..., 32]; every path is a circle (tail-biting): before its first code come
    its last ones.

    A code is (w << 1) | u with w the bits - 1 level bits and u the path bit; its level index is
    (w << 2) | c1 << 1 | c0.
    """
    u = codes & 1
    past = [np.roll(u, i, -1) for i in range(states.bit_length())]
    index: NDArray[np.uint8] = (codes >> 1 << 2).astype(np.uint8)
    for shift, taps in zip((1, 0), TRELLIS_TAPS[states]):
        for i, delayed in enumerate(past):
            if taps >> i & 1:
                index ^= (delayed << shift).astype(np.uint8)
    return index


def trellis_encode(x: F64, values: F64, bits: int, states: int) -> NDArray[np.uint8]:
    """The codes of least squared error on each path: Viterbi (1967) from every state back to itself.

    Args:
        x: paths [n, 32].
        values: [2^(bits + 1)] levels, ascending.
        bits, states: the trellis.

    Returns:
        [n, 32] uint8 codes, (w << 1) | u. Ties go to the lower level, predecessor and starting state.
    """
    n, length = x.shape
    by_subset = ((x[:, :, None] - values) ** 2).reshape(n, length, 1 << (bits - 1), 4)
    best_w, best = by_subset.argmin(2), by_subset.min(2)
    edges = [(state, u, *trellis_step(state, u, states)) for state in range(states) for u in (0, 1)]
    before = np.array([[e for e in edges if e[2] == after] for after in range(states)])
    previous, bit, subset = before[..., 0], before[..., 1], before[..., 3]

    # cost[i, a, s]: least cost of a path of row i from state a to state s
    cost = np.where(np.eye(states, dtype=bool), 0.0, np.inf)[None].repeat(n, 0)
    choice = np.empty((n, length, states, states), np.int8)
    for t in range(length):
        options = cost[:, :, previous] + best[:, t][:, subset][:, None]
        choice[:, t] = options.argmin(-1)
        cost = options.min(-1)
    rows = np.arange(n)
    start = np.diagonal(cost, axis1=1, axis2=2).argmin(1)
    state = start
    codes = np.empty((n, length), np.uint8)
    for t in range(length - 1, -1, -1):
        pick = choice[rows, t, start, state]
        codes[:, t] = best_w[rows, t, subset[state, pick]] << 1 | bit[state, pick]
        state = previous[state, pick]
    return codes


def train_trellis(bits: int, states: int, samples: int = 4000, rounds: int = 15, seed: int = 1) -> F64:
    """Levels of a trellis code for N(0, 1) by the generalised Lloyd iteration on samples, made symmetric each round."""
    levels = 1 << (bits + 1)
    x = np.random.default_rng(seed).standard_normal((samples, 32))
    edges = (np.arange(levels) + 0.5) / levels
    values = 1.15 * np.array([_normal_quantile(p) for p in edges])
    for _ in range(rounds):
        index = trellis_levels(trellis_encode(x, values, bits, states), bits, states)
        total = np.bincount(index.ravel(), x.ravel(), levels)
        values = total / np.maximum(np.bincount(index.ravel(), minlength=levels), 1)
        values = (values - values[::-1]) / 2
    return values


def _normal_quantile(p: float) -> float:
    low, high = -10.0, 10.0
    for _ in range(80):
        mid = (low + high) / 2
        low, high = (mid, high) if 0.5 * (1 + math.erf(mid / math.sqrt(2))) < p else (low, mid)
    return low


# (bits, states) -> positive int8 levels and unit, as `train_trellis` and `to_int8` give them.
TRAINED: dict[tuple[int, int], tuple[tuple[int, ...], float]] = {
    (3, 4): ((5, 16, 26, 38, 51, 67, 89, 127), 0.019082061),
    (3, 8): ((5, 15, 26, 37, 50, 66, 89, 127), 0.019202877),
    (2, 4): ((12, 43, 72, 127), 0.014721981),
    (2, 8): ((13, 41, 72, 127), 0.014664750),
}


@lru_cache
def codebook(bits: int, code: Code) -> Codebook:
    """The codebook of a code. Raises ValueError for an unknown pair."""
    check_code("k", bits, code)
    if code == "scalar":
        return Codebook(bits, 1, *to_int8(lloyd_max(1 << bits)))
    states = int(code.removeprefix("trellis"))
    positive, unit = TRAINED[bits, states]
    return Codebook(bits, states, tuple(-v for v in reversed(positive)) + positive, unit)
