"""From vectors to codes and scales."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..codec import packing
from ..codec.codebook import Codebook, trellis_encode, trellis_levels, trellis_step
from ..codec.spec import PAGE

F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]
Feedback = tuple[F64, F64]
"""Factor [orders, padded_dim, padded_dim] and weight [orders, padded_dim] of one head's `codec.shaping.Shaping`."""

MULTIPLIERS = (0.9, 0.95, 1.0, 1.05, 1.1)
"""A refining encoder codes every vector again at these multiples of its own scale."""


def quantize(
    y: F64, book: Codebook, side: str, rule: str, refine: bool = False, feedback: Feedback | None = None
) -> tuple[U8, F64]:
    """Codes [64, padded_dim] and scales [64] of the vectors y [64, padded_dim] of one side of a page.

    Each vector is divided by its root mean square n. With u the divided vector and c its code values the scale is
    n <u, u> / <u, c> ("unbiased": <y, y_hat> = <y, y>), n <u, c> / <c, c> ("least_squares") or n |u| / |c| ("norm").

    `refine` codes again u <c, c> / <u, c> m for each multiplier m and keeps, in every group of tokens that share a
    path, the codes with the smallest error e^T H e summed over the group, e = u - c scale / n. H is the identity, or
    what `feedback` stands for; then the codes themselves are found with that feedback.
    """
    n = np.sqrt((y * y).mean(1))
    u = y / np.where(n > 0, n, 1)[:, None]
    codes, c = _codes(u, book, side, feedback)
    if refine:
        group = path_groups(side, y.shape[1], book.states)
        cc, uc = (c * c).sum(1), (u * c).sum(1)
        fit = np.where(uc > 0, cc / np.where(uc > 0, uc, 1), 1)
        least = _error(u, c, rule, feedback, group)
        for m in MULTIPLIERS:
            other, value = _codes(u * (fit * m)[:, None], book, side, feedback)
            error = _error(u, value, rule, feedback, group)
            better = (error < least)[group]
            least = np.minimum(error, least)
            codes, c = np.where(better[:, None], other, codes), np.where(better[:, None], value, c)
    return codes, n * _gain(u, c, rule)


def dequantize(codes: U8, scales: F64, book: Codebook, side: str) -> F64:
    """Vectors [64, padded_dim] from codes and scales [64]."""
    return scales[:, None] * _values(codes, book, side)


def path_groups(side: str, padded_dim: int, states: int) -> NDArray[np.intp]:
    """Number of the group of each of the 64 tokens; tokens of a group share trellis paths (docs/format.md)."""
    token = np.arange(PAGE)
    if states == 1:
        return token
    if side == "v":
        return token >> 4
    size = _tokens_of_run(padded_dim)
    return (((token >> 4) * 2 + (token & 1)) * 8 + (token % 16 >> 1)) // size


def _run(padded_dim: int) -> int:
    """Units of a lane after which a key's path units begin at a new token."""
    steps = padded_dim // 32
    return steps // math.gcd(4, steps)


def _tokens_of_run(padded_dim: int) -> int:
    return 4 * _run(padded_dim) // (padded_dim // 32)


def _gain(u: F64, c: F64, rule: str) -> F64:
    uu, uc, cc = (u * u).sum(1), (u * c).sum(1), (c * c).sum(1)
    if rule == "norm":
        return np.sqrt(uu / cc)
    return uc / cc if rule == "least_squares" else uu / np.where(uc > 0, uc, 1)


def _error(u: F64, c: F64, rule: str, feedback: Feedback | None, group: NDArray[np.intp]) -> F64:
    """e^T H e summed over the tokens of each group, [groups]."""
    e = u - c * _gain(u, c, rule)[:, None]
    if feedback is None:
        per_token = (e * e).sum(1)
    else:
        factor, weight = feedback
        per_token = (e @ factor[0].T) ** 2 @ weight[0]
    return np.bincount(group, per_token).astype(np.float64)


def _values(codes: U8, book: Codebook, side: str) -> F64:
    if book.states == 1:
        return book.values[codes]
    token, channel = (packing.k_layout if side == "k" else packing.v_layout)(codes.shape[1])
    c = np.empty(codes.shape)
    c[token, channel] = book.values[trellis_levels(codes[token, channel], book.bits, book.states)]
    return c


def _codes(x: F64, book: Codebook, side: str, feedback: Feedback | None) -> tuple[U8, F64]:
    """Codes and values [64, padded_dim] of x as it is."""
    if book.states == 1:
        codes = _scalar(x, book, feedback)
    elif feedback is None:
        token, channel = (packing.k_layout if side == "k" else packing.v_layout)(x.shape[1])
        codes = np.empty(x.shape, np.uint8)
        paths = trellis_encode(x[token, channel].reshape(-1, 32), book.values, book.bits, book.states)
        codes[token, channel] = paths.reshape(token.shape)
    else:
        codes = _shaped_paths(x, book, feedback)
    return codes, _values(codes, book, side)


def _scalar(x: F64, book: Codebook, feedback: Feedback | None) -> U8:
    values = book.values
    edges = (values[1:] + values[:-1]) / 2
    if feedback is None:
        return np.searchsorted(edges, x).astype(np.uint8)
    codes, error = np.empty(x.shape, np.uint8), np.zeros(x.shape)
    for i in packing.key_orders(x.shape[1])[0][0]:
        codes[:, i] = np.searchsorted(edges, x[:, i] + error @ feedback[0][0, i])
        error[:, i] = x[:, i] - values[codes[:, i]]
    return codes


def _shaped_paths(x: F64, book: Codebook, feedback: Feedback) -> U8:
    """Codes of keys on trellis paths with feedback: units are coded in the order of their channels, and every survivor
    of the search carries the errors of its own path."""
    dim = x.shape[1]
    token, channel = packing.k_layout(dim)
    _, order = packing.key_orders(dim)
    factor, weight = feedback
    codes, error = np.empty(x.shape, np.uint8), np.zeros(x.shape)
    run = _run(dim)
    for t in range(4):
        for first in range(run):
            # Rows: all units at the same channels, eight lanes times the runs of each.
            where = token[t::4, first::run].reshape(-1, 32)
            at, own = channel[t, first], order[where[0]]
            base = (error[where] * factor[own, at]).sum(-1)
            same = where[0][:, None] == where[0]
            inside = np.tril(factor[own[:, None], at[:, None], at] * same, -1)
            target = x[where, at]
            start = circular_start(target + base, book)
            found, e = _survivors(target, base, inside, weight[own, at], start, book)
            codes[where, at], error[where, at] = found, e
    return codes


def _edges(states: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Predecessors, path bits and subsets of the two branches into each state, each [states, 2]."""
    edges = [(state, u, *trellis_step(state, u, states)) for state in range(states) for u in (0, 1)]
    into = np.array([[e for e in edges if e[2] == after] for after in range(states)])
    return into[..., 0], into[..., 1], into[..., 3]


def circular_start(x: F64, book: Codebook) -> NDArray[np.intp]:
    """The state in which the path of each row of x [n, 32] starts and ends, [n]: that of the cheapest survivor of two
    laps around the circle, from its middle, when it last passed the start."""
    previous, _, subset = _edges(book.states)
    best = ((x[:, :, None] - book.values) ** 2).reshape(*x.shape, -1, 4).min(2)
    cost = np.zeros((x.shape[0], book.states))
    origin = np.zeros(cost.shape, np.intp)
    for i in range(64):
        if i == 48:
            origin[:] = np.arange(book.states)
        options = cost[:, previous] + best[:, (i + 16) % 32][:, subset]
        pick = options.argmin(-1)
        cost = options.min(-1)
        origin = np.take_along_axis(origin[:, previous], pick[..., None], -1)[..., 0]
    return origin[np.arange(len(x)), cost.argmin(1)]


def _survivors(x: F64, base: F64, inside: F64, weight: F64, start: NDArray[np.intp], book: Codebook) -> tuple[U8, F64]:
    """Viterbi search from `start` back to it, x and base [n, 32]: codes and errors [n, 32]."""
    n, states, values = len(x), book.states, book.values
    previous, bit, subset = _edges(states)
    rows = np.arange(n)[:, None]
    cost = np.where(np.arange(states) == start[:, None], 0.0, np.inf)
    error, codes = np.zeros((n, states, 32)), np.zeros((n, states, 32), np.uint8)
    for i in range(32):
        target = (x + base)[:, i, None] + error[:, :, :i] @ inside[i, :i]
        distance = ((target[..., None] - values) ** 2).reshape(n, states, -1, 4)
        level, best = distance.argmin(2), distance.min(2)
        options = cost[:, previous] + weight[i] * best[:, previous, subset]
        pick = options.argmin(-1)
        branch, cost = (np.arange(states), pick), options.min(-1)
        came, kind = previous[branch], subset[branch]
        w = level[rows, came, kind]
        error, codes = error[rows, came], codes[rows, came]
        error[..., i] = x[:, i, None] - values[w << 2 | kind]
        codes[..., i] = w << 1 | bit[branch]
    return codes[rows[:, 0], start], error[rows[:, 0], start]
