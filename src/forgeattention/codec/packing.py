"""Codes to bytes and back, in NumPy (docs/format.md). The kernels' twin of this file is kernels/shared/format.h.

The order of codes inside a record is that of int8 tensor-core fragments (mma.m16n8k32): lane 4 g + t of 32 holds
padded_dim / 16 units of 32 codes, and a unit is four nibble words of 8 codes. Code e (0..7) of nibble word n is the
unit's code 4 e + n; in that order a trellis path runs through them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .spec import LANES, PAGE, PageFormat

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]


@lru_cache
def k_layout(padded_dim: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Token and channel of each key code, both [lane, unit, 32]. A lane's nibble word i = 4 unit + n = j S + s holds
    eight neighbouring channels of one token (S = padded_dim / 32)."""
    steps = padded_dim // 32
    lane, unit, e, n = _places(padded_dim)
    i = 4 * unit + n
    g, t, j, s = lane >> 2, lane & 3, i // steps, i % steps
    token = (g >> 1) * 16 + 2 * j + (g & 1)
    channel = t * (padded_dim // 4) + 8 * s + e
    return token.reshape(LANES, -1, 32), channel.reshape(LANES, -1, 32)


@lru_cache
def v_layout(padded_dim: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Token and channel of each value code, both [lane, unit, 32]. A unit holds 16 neighbouring tokens of two
    channels; each half of a nibble word is four neighbouring tokens of one channel."""
    lane, unit, e, n = _places(padded_dim)
    token = (lane & 3) * 16 + 4 * n + (e & 3)
    channel = 16 * unit + (lane >> 2) + 8 * (e >> 2)
    return token.reshape(LANES, -1, 32), channel.reshape(LANES, -1, 32)


def _places(padded_dim: int) -> tuple[NDArray[np.intp], ...]:
    return tuple(np.meshgrid(*map(np.arange, (LANES, padded_dim // 16, 8, 4)), indexing="ij"))


@lru_cache
def key_orders(padded_dim: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """In which order trellis paths visit the channels of a key.

    Returns:
        Channels by rank, [orders, padded_dim], and which order a token has, [64]. All tokens have the same, except
        where units begin within tokens: at padded_dim 96 there are three.
    """
    token, channel = k_layout(padded_dim)
    steps = padded_dim // 32
    visits = np.empty((PAGE, padded_dim), np.intp)
    for t in range(4):
        # A quarter of the channels of all tokens, unit after unit.
        tokens, channels = token[t::4].ravel(), channel[t::4].ravel()
        by_token = np.argsort(tokens, kind="stable").reshape(PAGE, 8 * steps)
        visits[:, t * 8 * steps : (t + 1) * 8 * steps] = channels[by_token]
    number: dict[bytes, int] = {}
    which = np.array([number.setdefault(row.tobytes(), len(number)) for row in visits])
    return visits[np.unique(which, return_index=True)[1]], which


def pack_unit(codes: U8, bits: int, trellis: bool) -> U32:
    """Codes [..., 32] of `bits` bits to words [..., bits].

    Scalar codes of 3 bits: the words hold the codes of n = 0, 1, 2 in their nibbles, and those of n = 3 in the
    nibbles' spare bits. Trellis codes (level bits w, path bit u): the path bits are a word of their own, code i in bit
    i; two level bits are the upper (n = 0, 1) or lower (n = 2, 3) pair of the nibbles of two words, one is bit i of a
    word.
    """
    c: NDArray[Any] = codes.reshape(*codes.shape[:-1], 8, 4).astype(np.uint32)
    n0, n1, n2, n3 = nibbles = list(np.moveaxis(c, -1, 0))
    if trellis:
        w, place = c >> 1, np.arange(4, dtype=np.uint32)
        nibbles = [np.bitwise_or.reduce((c & 1) << place, axis=-1)]
        if bits == 2:
            nibbles += [np.bitwise_or.reduce(w << place, axis=-1)]
        else:
            nibbles += [w[..., 0] << 2 | w[..., 2], w[..., 1] << 2 | w[..., 3]]
    elif bits == 2:
        nibbles = [n0 | n1 << 2, n2 | n3 << 2]
    elif bits == 3:
        nibbles = [n | (n3 >> k & 1) << 3 for k, n in enumerate((n0, n1, n2))]
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return np.bitwise_or.reduce(np.stack(nibbles, -2) << shifts, axis=-1).astype(np.uint32)


def unpack_unit(words: U32, bits: int, trellis: bool) -> U8:
    """The inverse of `pack_unit`: words [..., bits] to codes [..., 32]."""
    w = np.moveaxis(words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15, -2, 0)  # [bits, ..., 8] nibbles
    if trellis:
        path = [w[0] >> n & 1 for n in range(4)]
        level = [w[1] >> n & 1 for n in range(4)] if bits == 2 else [w[1] >> 2, w[2] >> 2, w[1] & 3, w[2] & 3]
        c = [pair << 1 | u for pair, u in zip(level, path)]
    elif bits == 4:
        c = list(w)
    elif bits == 2:
        c = [w[0] & 3, w[0] >> 2, w[1] & 3, w[1] >> 2]
    else:
        c = [*(w & 7), w[0] >> 3 | (w[1] >> 3) << 1 | (w[2] >> 3) << 2]
    return np.stack(c, -1).reshape(*words.shape[:-1], 32).astype(np.uint8)


def words_to_bytes(words: U32) -> U8:
    """Words [lane, unit, bits] to the record's bytes: [unit / c][word][lane][c] with c = 4 units side by side (2 if
    the number of units is no multiple of 4), so that each lane loads 16 (8) bytes at once."""
    lanes, units, bits = words.shape
    c = 4 if units % 4 == 0 else 2
    return (
        np.ascontiguousarray(words.reshape(lanes, units // c, c, bits).transpose(1, 3, 0, 2))
        .astype("<u4")
        .view(np.uint8)
        .reshape(-1)
    )


def bytes_to_words(data: U8, units: int, bits: int) -> U32:
    """The inverse of `words_to_bytes`."""
    c = 4 if units % 4 == 0 else 2
    w = np.ascontiguousarray(data).view("<u4").reshape(units // c, bits, LANES, c)
    return np.ascontiguousarray(w.transpose(2, 0, 3, 1)).reshape(LANES, units, bits)


def pack_codes(codes: U8, bits: int, side: str, trellis: bool = False) -> U8:
    """Codes [64, padded_dim] of one side ("k" or "v") of a page to bytes."""
    token, channel = (k_layout if side == "k" else v_layout)(codes.shape[1])
    return words_to_bytes(pack_unit(codes[token, channel], bits, trellis))


def unpack_codes(data: U8, padded_dim: int, bits: int, side: str, trellis: bool = False) -> U8:
    """The inverse of `pack_codes`."""
    token, channel = (k_layout if side == "k" else v_layout)(padded_dim)
    codes = np.empty((PAGE, padded_dim), np.uint8)
    codes[token, channel] = unpack_unit(bytes_to_words(data, padded_dim // 16, bits), bits, trellis)
    return codes


def pack_header(mean: NDArray[np.float64], mean_scale: float, k_base: int, v_base: int) -> NDArray[np.int8]:
    """The int8 mean row of a page with its header in the low bits.

    Args:
        mean: mean / mean_scale, [padded_dim], within [-127, 127].
        mean_scale: fp16 step of the row.
        k_base, v_base: exponents of the "log8" scales, -128..127.

    Returns:
        [padded_dim] int8. Bit i of the header (fp16 mean_scale, then k_base, then v_base) is the low bit of byte i
        for i < 32; each such byte is the nearest value with that low bit.
    """
    header = int(np.float16(mean_scale).view(np.uint16)) | (k_base & 255) << 16 | (v_base & 255) << 24
    bit = header >> np.arange(32) & 1
    mean = np.clip(mean, -127, 127)  # a subnormal step may have been rounded down
    row = np.rint(mean)
    head = np.rint((mean[:32] - bit) / 2) * 2 + bit
    row[:32] = np.where(head > 127, head - 2, head)
    return row.astype(np.int8)


def unpack_header(row: NDArray[np.int8]) -> tuple[float, int, int]:
    """mean_scale, k_base and v_base of an int8 mean row."""
    header = int(((row[:32].astype(np.int64) & 1) << np.arange(32)).sum())
    signed = [int(np.uint8(header >> s & 255).astype(np.int8)) for s in (16, 24)]
    return float(np.uint16(header & 0xFFFF).view(np.float16)), signed[0], signed[1]


LOG8_STEPS = 32
"""Steps per octave of a "log8" scale."""


def log8_base(scales: NDArray[np.float64]) -> int:
    """The smallest base with which every scale of a page is representable: the largest scale is at most code 255."""
    top = float(scales.max(initial=0.0))
    if top <= 0:
        return 0
    return int(np.clip(np.ceil(np.log2(top) - 254.5 / LOG8_STEPS), -128, 127))


def log8_encode(scales: NDArray[np.float64], base: int) -> U8:
    """Nearest code of each scale on the logarithmic grid 2^(base + (b - 1) / 32); 0 stands for zero. A scale under
    the grid becomes its lowest step, or zero under half of it."""
    with np.errstate(divide="ignore"):
        b = np.rint((np.log2(scales) - base) * LOG8_STEPS) + 1
    b = np.where(scales < 2.0 ** (base - 1), 0, np.clip(b, 1, 255))
    return b.astype(np.uint8)


def log8_decode(codes: U8, base: int) -> NDArray[np.float64]:
    return np.where(codes == 0, 0.0, 2.0 ** (base + (codes.astype(np.float64) - 1) / LOG8_STEPS))


def split_record(record: U8, fmt: PageFormat) -> dict[str, NDArray]:
    """Views of a record's parts: "k", "k_scales", "mean", "v", "v_scales" (codes and scales as stored)."""
    if record.shape != (fmt.record_bytes,) or record.dtype != np.uint8:
        raise ValueError(f"[split_record] expected uint8 [{fmt.record_bytes}]; got {record.dtype} {list(record.shape)}")
    scale_type = np.dtype("<f2") if fmt.scales == "fp16" else np.dtype(np.uint8)
    return {
        "k": record[: fmt.k_scale_offset],
        "k_scales": record[fmt.k_scale_offset : fmt.mean_offset].view(scale_type),
        "mean": record[fmt.mean_offset : fmt.v_offset].view(np.int8),
        "v": record[fmt.v_offset : fmt.v_scale_offset],
        "v_scales": record[fmt.v_scale_offset :].view(scale_type),
    }
