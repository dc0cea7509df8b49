"""Codes to bytes and back, in NumPy (docs/format.md). The kernels' twin of this file is kernels/shared/format.h.

The order of codes inside a record is that of int8 tensor-core fragments (mma.m16n8k32): lane 4 g + t of 32 holds
padded_dim / 16 units of 32 codes, and a unit is four nibble words of 8 codes.
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
    """Token and channel of each key code, both [lane, unit, 32]. A lane's nibble word i = j S + s holds eight
    neighbouring channels of one token (S = padded_dim / 32)."""
    steps = padded_dim // 32
    lane, i, e = np.meshgrid(np.arange(LANES), np.arange(8 * steps), np.arange(8), indexing="ij")
    g, t, j, s = lane >> 2, lane & 3, i // steps, i % steps
    token = (g >> 1) * 16 + 2 * j + (g & 1)
    channel = t * (padded_dim // 4) + 8 * s + e
    return token.reshape(LANES, -1, 32), channel.reshape(LANES, -1, 32)


@lru_cache
def v_layout(padded_dim: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Token and channel of each value code, both [lane, unit, 32]. A unit holds 16 neighbouring tokens of two
    channels; each half of a nibble word is four neighbouring tokens of one channel."""
    lane, unit, n, e = np.meshgrid(
        np.arange(LANES), np.arange(padded_dim // 16), np.arange(4), np.arange(8), indexing="ij"
    )
    token = (lane & 3) * 16 + 4 * n + (e & 3)
    channel = 16 * unit + (lane >> 2) + 8 * (e >> 2)
    return token.reshape(LANES, -1, 32), channel.reshape(LANES, -1, 32)


def pack_unit(codes: U8, bits: int, trellis: bool) -> U32:
    """Codes [..., 32] of `bits` bits to words [..., bits].

    At 3 bits the words hold the first 24 codes in their nibbles and the last 8 codes in the nibbles' spare bits. A
    scalar code leaves bit 3 of a nibble spare; a trellis code (level bits w, path bit u) leaves bit 1 spare, so that
    a word masked is already the nibble w1 w0 . u.
    """
    c: NDArray[Any] = codes.reshape(*codes.shape[:-1], 4, 8).astype(np.uint32)
    if bits == 4:
        nibbles = c
    elif bits == 2:
        nibbles = np.stack([c[..., 0, :] | c[..., 1, :] << 2, c[..., 2, :] | c[..., 3, :] << 2], -2)
    elif trellis:
        spare = np.stack([c[..., 3, :] >> 2 & 1, c[..., 3, :] >> 1 & 1, c[..., 3, :] & 1], -2)
        nibbles = (c[..., :3, :] & 6) << 1 | (c[..., :3, :] & 1) | spare << 1
    else:
        spare = np.stack([c[..., 3, :] & 1, c[..., 3, :] >> 1 & 1, c[..., 3, :] >> 2 & 1], -2)
        nibbles = c[..., :3, :] | spare << 3
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return np.bitwise_or.reduce(nibbles << shifts, axis=-1).astype(np.uint32)


def unpack_unit(words: U32, bits: int, trellis: bool) -> U8:
    """The inverse of `pack_unit`: words [..., bits] to codes [..., 32]."""
    n = words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    if bits == 4:
        c = n
    elif bits == 2:
        c = np.stack([n[..., 0, :] & 3, n[..., 0, :] >> 2, n[..., 1, :] & 3, n[..., 1, :] >> 2], -2)
    elif trellis:
        last = (n[..., 0, :] >> 1 & 1) << 2 | (n[..., 1, :] >> 1 & 1) << 1 | (n[..., 2, :] >> 1 & 1)
        c = np.concatenate([(n >> 1 & 6) | (n & 1), last[..., None, :]], -2)
    else:
        last = n[..., 0, :] >> 3 | (n[..., 1, :] >> 3) << 1 | (n[..., 2, :] >> 3) << 2
        c = np.concatenate([n & 7, last[..., None, :]], -2)
    return c.reshape(*words.shape[:-1], 32).astype(np.uint8)


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
