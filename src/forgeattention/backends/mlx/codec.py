"""A codec as arrays of MLX, and the linear steps around a kernel that knows stored vectors only. The array module is an
argument: the tests run Metal's launches on NumPy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ...codec.codec import Codec
from ...codec.packing import key_orders


@dataclass(frozen=True)
class CodecArrays:
    """A codec's constants on a device, float32.

    Attributes:
        k_values, v_values: [16], the codebooks for unit variance; levels times unit.
        k_levels, v_levels: [16], the int8 levels.
        units: [2], of keys and of values.
        k_inverse, v_inverse, k_forward, v_forward: [heads, head_dim, padded_dim] with x = inverse y + mu and
            y = forward^T (x - mu).
        k_factor: [heads, orders, padded_dim, padded_dim], how keys are shaped; a placeholder where they are not.
        k_weight: [heads, orders, padded_dim], likewise.
        orders: uint8 [64], which order a token has.
        k_mu, v_mu: [heads, head_dim, 1], or None.
    """

    k_values: Any
    v_values: Any
    k_levels: Any
    v_levels: Any
    units: Any
    k_inverse: Any
    v_inverse: Any
    k_forward: Any
    v_forward: Any
    k_factor: Any
    k_weight: Any
    orders: Any
    k_mu: Any | None
    v_mu: Any | None


_constants: WeakKeyDictionary[Codec, dict[int, CodecArrays]] = WeakKeyDictionary()


def codec_arrays(codec: Codec, xp: Any) -> CodecArrays:
    """The codec's constants as arrays of `xp`, made once."""
    cached = _constants.setdefault(codec, {})
    if id(xp) not in cached:
        books = (codec.k_codebook, codec.v_codebook)
        values = [np.resize(b.values, 16).astype(np.float32) for b in books]
        levels = [np.resize(b.levels, 16).astype(np.float32) for b in books]
        units = np.array([b.unit for b in books], np.float32)
        sides = (codec.k_transform, codec.v_transform)
        inverse = [np.ascontiguousarray(t.inverse[:, : codec.head_dim]) for t in sides]
        forward = [np.ascontiguousarray(t.forward[:, :, : codec.head_dim].swapaxes(1, 2)) for t in sides]
        # MLX passes arrays of fewer than eight elements in another address space.
        nothing, shaping = np.zeros((1, 1, 8), np.float32), codec.shaping
        shape = [nothing, nothing] if shaping is None else [shaping.factor, shaping.weight]
        shape.append(key_orders(codec.format.padded_dim)[1].astype(np.uint8))
        mu = [None if t.mu is None else np.ascontiguousarray(t.mu[:, : codec.head_dim, None]) for t in sides]
        cached[id(xp)] = CodecArrays(
            *(None if a is None else xp.array(a) for a in (*values, *levels, units, *inverse, *forward, *shape, *mu))
        )
    return cached[id(xp)]


def exact_product(x: Any, y: Any, xp: Any) -> Any:
    """x @ y to float32's precision, also on GPUs that multiply float32 as TF32, 11 bits of it (Apple's M5 since macOS
    26.2, NVIDIA's): where codes are decided, 11 bits would give other ones than another machine.

    Each factor is split into its upper 11 bits and the rest. The product of the two rests is left out: 2^-22 of the
    whole.
    """
    (x_high, x_low), (y_high, y_low) = _halves(x, xp), _halves(y, xp)
    return x_high @ y_high + (x_low @ y_high + x_high @ y_low)


def _halves(x: Any, xp: Any) -> tuple[Any, Any]:
    x = x.astype(xp.float32)
    high = (x.view(xp.uint32) & xp.array(0xFFFFE000, dtype=xp.uint32)).view(xp.float32)
    return high, x - high


def packed_queries(q: Any, codec: Codec, factor: float, xp: Any) -> tuple[Any, Any, Any]:
    """Queries as the kernels take them, for q [batch, q_heads, n, head_dim].

    Returns:
        A^-T q [batch, q_heads, n, padded_dim], q itself, and q . mu [batch, q_heads, n]: float32, times `factor`.
    """
    c = codec_arrays(codec, xp)
    batch, heads, n, dim = q.shape
    flat = (q.astype(xp.float32) * factor).reshape(batch, codec.kv_heads, -1, dim)
    rotated = (flat @ c.k_inverse).reshape(batch, heads, n, -1)
    bias = xp.zeros((batch, heads, n), dtype=xp.float32)
    if c.k_mu is not None:
        bias = (flat @ c.k_mu).reshape(batch, heads, n)
    return rotated, flat.reshape(q.shape), bias


def unpacked_values(o: Any, mass: Any, codec: Codec, xp: Any) -> Any:
    """Weighted sums of stored values in the model's coordinates.

    Args:
        o: [batch, q_heads, n, padded_dim], sums of stored values.
        mass: [batch, q_heads, n], sums of their weights.
        codec: the layer's codec.
        xp: the array module.

    Returns:
        [batch, q_heads, n, head_dim].
    """
    c = codec_arrays(codec, xp)
    batch, heads, n, width = o.shape
    x = o.reshape(batch, codec.kv_heads, -1, width) @ c.v_inverse.swapaxes(1, 2)
    if c.v_mu is not None:
        x = x + mass.reshape(batch, codec.kv_heads, -1, 1) * c.v_mu.swapaxes(1, 2)
    return x.reshape(batch, heads, n, codec.head_dim)
