"""Encoding and decoding of page records."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..codec import packing
from ..codec.codec import Codec
from ..codec.spec import PAGE
from ..codec.transform import Transform
from .quantize import Feedback, dequantize, quantize

F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]

MARGIN, REFINED_MARGIN = 2.0 ** (1 / 16), 2.0 ** (1 / 4)
"""How far the low bits of the mean row, and refinement too, are expected to raise a scale."""


def matrices(t: Transform, head: int) -> tuple[F64, F64, F64]:
    """A, its inverse and mu of one head, float64."""
    mu = np.zeros((1, t.forward.shape[1])) if t.mu is None else t.mu
    a, i = t.forward[head % t.forward.shape[0]], t.inverse[head % t.inverse.shape[0]]
    return a.astype(np.float64), i.astype(np.float64), mu[head % mu.shape[0]].astype(np.float64)


def _feedback(codec: Codec, head: int) -> Feedback | None:
    if codec.shaping is None:
        return None
    factor, weight = (x[head % x.shape[0]].astype(np.float64) for x in (codec.shaping.factor, codec.shaping.weight))
    return factor, weight


def encode_page(k: ArrayLike, v: ArrayLike, codec: Codec, head: int = 0) -> U8:
    """The record of 64 tokens of one KV head.

    Args:
        k, v: [64, head_dim].
        codec: the layer's codec.
        head: which KV head (its transform).

    Returns:
        [record_bytes] uint8.

    Raises:
        ValueError: a wrong shape or a value that is not finite.
    """
    fmt, spec = codec.format, codec.spec
    pad = ((0, 0), (0, fmt.padded_dim - fmt.head_dim))
    y = {}
    for side, x, t in (("k", k, codec.k_transform), ("v", v, codec.v_transform)):
        x64 = np.asarray(x, np.float64)
        if x64.shape != (PAGE, fmt.head_dim):
            raise ValueError(f"[encode] expected {side} [{PAGE}, {fmt.head_dim}]; got {list(x64.shape)}")
        if not np.isfinite(x64).all():
            raise ValueError(f"[encode] expected finite {side}; got NaN or infinity")
        a, _, mu = matrices(t, head)
        y[side] = (np.pad(x64, pad) - mu) @ a.T

    mean = y["k"].mean(0) if spec.key_mean else np.zeros(fmt.padded_dim)
    with np.errstate(over="ignore"):
        step = float(np.float16(np.abs(mean).max() / 126.5))
    if not np.isfinite(step):
        raise ValueError(
            f"[encode] expected vectors that fp16 scales can hold; got keys of mean {np.abs(mean).max():.3g}"
        )
    grid = mean / step if step > 0 else mean
    v_codes, v_scales = quantize(y["v"], codec.v_codebook, "v", spec.v_scale_rule, spec.refine)
    v_base = packing.log8_base(v_scales) if fmt.scales == "log8" else 0

    # The base of K's scales stands in low bits of the row, on which the residual depends: it is guessed from plain
    # codes of the residual without it, and raised where a scale does not fit after all.
    k_base = 0
    if fmt.scales == "log8":
        residual = y["k"] - packing.pack_header(grid, step, 0, v_base) * step
        _, k_probe = quantize(residual, codec.k_codebook, "k", spec.k_scale_rule)
        k_base = packing.log8_base(k_probe * (REFINED_MARGIN if spec.refine else MARGIN))
    while True:
        row = packing.pack_header(grid, step, k_base, v_base)
        k_codes, k_scales = quantize(
            y["k"] - row * step, codec.k_codebook, "k", spec.k_scale_rule, spec.refine, _feedback(codec, head)
        )
        if fmt.scales != "log8" or packing.log8_base(k_scales) <= k_base or k_base == 127:
            break
        k_base = packing.log8_base(k_scales)

    record = np.empty(fmt.record_bytes, np.uint8)
    part = packing.split_record(record, fmt)
    part["k"][:] = packing.pack_codes(k_codes, fmt.k_bits, "k", fmt.k_code != "scalar")
    part["v"][:] = packing.pack_codes(v_codes, fmt.v_bits, "v", fmt.v_code != "scalar")
    part["mean"][:] = row
    for name, scales, base in (("k_scales", k_scales, k_base), ("v_scales", v_scales, v_base)):
        part[name][:] = packing.log8_encode(scales, base) if fmt.scales == "log8" else scales
        if not np.isfinite(part[name].astype(np.float64)).all():
            raise ValueError(
                f"[encode] expected vectors that fp16 scales can hold; got {name} up to {scales.max():.3g}"
            )
    return record


def decode_page(record: U8, codec: Codec) -> tuple[F64, F64]:
    """Rotated keys and values of a record: y_k and y_v, each [64, padded_dim]."""
    fmt = codec.format
    part = packing.split_record(record, fmt)
    step, k_base, v_base = packing.unpack_header(part["mean"])
    y = []
    for side, base, bits, code, book in (
        ("k", k_base, fmt.k_bits, fmt.k_code, codec.k_codebook),
        ("v", v_base, fmt.v_bits, fmt.v_code, codec.v_codebook),
    ):
        codes = packing.unpack_codes(part[side], fmt.padded_dim, bits, side, code != "scalar")
        stored = part[f"{side}_scales"]
        scales = packing.log8_decode(stored, base) if fmt.scales == "log8" else stored.astype(np.float64)
        y.append(dequantize(codes, scales, book, side))
    return y[0] + part["mean"].astype(np.float64) * step, y[1]


def encode(k: ArrayLike, v: ArrayLike, codec: Codec) -> U8:
    """Pages of k and v [kv_heads, 64 n, head_dim]: [n, kv_heads, record_bytes] uint8."""
    k64, v64 = np.asarray(k, np.float64), np.asarray(v, np.float64)
    pages = k64.shape[1] // PAGE
    return np.stack(
        [
            np.stack(
                [
                    encode_page(k64[h, p * PAGE :][:PAGE], v64[h, p * PAGE :][:PAGE], codec, h)
                    for h in range(k64.shape[0])
                ]
            )
            for p in range(pages)
        ]
    )


def decode_pages(pages: U8, codec: Codec) -> tuple[F64, F64]:
    """Keys and values in the model's own coordinates from pages [n, kv_heads, record_bytes]: two arrays
    [kv_heads, 64 n, head_dim]."""
    n, heads, _ = pages.shape
    out = np.zeros((2, heads, n * PAGE, codec.head_dim))
    for p in range(n):
        for h in range(heads):
            for i, (y, t) in enumerate(zip(decode_page(pages[p, h], codec), (codec.k_transform, codec.v_transform))):
                _, inverse, mu = matrices(t, h)
                out[i, h, p * PAGE : (p + 1) * PAGE] = (y @ inverse.T + mu)[:, : codec.head_dim]
    return out[0], out[1]


def compact(base: U8, offsets: NDArray[np.int64], page_bytes: int) -> U8:
    """The pages at `offsets` of `base` [bytes], side by side: [pages, page_bytes]."""
    return np.stack([base[at : at + page_bytes] for at in offsets.tolist()] or [np.zeros(page_bytes, np.uint8)])[
        : len(offsets)
    ]
