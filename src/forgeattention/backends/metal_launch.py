"""How Metal kernels are launched: their text, the device that runs them, a codec's constants as arrays on it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from ..codec.codec import Codec
from ..codec.packing import key_orders
from ..codec.spec import CODES, PAGE, SCALE_FORMATS
from ..ops.table import PageTable

KERNELS = Path(__file__).parent.parent / "kernels" / "metal"
BODY = "//! body\n"
"""The line in a kernel's file after which the body of the kernel function begins; MLX writes its signature."""
THREADS = 128
"""Threads of a threadgroup: four simdgroups, a page each."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: stem of the file in kernels/metal.
        inputs: arrays by name, in the order of the kernel's parameters.
        outputs: (shape, dtype name) by name, likewise.
        groups: threadgroups in x, y, z.
        threads: threads of a threadgroup in x, y, z.
        template: template arguments in order; a string is a dtype's name.
    """

    kernel: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, tuple[tuple[int, ...], str]]
    groups: tuple[int, int, int]
    template: Sequence[tuple[str, str | int | bool]]
    threads: tuple[int, int, int] = (THREADS, 1, 1)

    @property
    def grid(self) -> tuple[int, int, int]:
        """MLX's grid, which counts threads."""
        x, y, z = (g * t for g, t in zip(self.groups, self.threads, strict=True))
        return x, y, z


class Device(Protocol):
    """What runs launches: MLX, or an emulator of it."""

    xp: Any
    """The array module: mlx.core or numpy."""

    def run(self, launch: Launch) -> list[Any]:
        """The outputs in order."""
        ...


@cache
def kernel_text(kernel: str) -> tuple[str, str]:
    """Header and body of a kernel for `mx.fast.metal_kernel`: its includes put in place, each once, without bodies."""
    seen: set[Path] = set()

    def expand(path: Path) -> str:
        if path in seen:
            return ""
        seen.add(path)
        text = path.read_text().replace("#pragma once\n", "").partition(BODY)[0]
        return re.sub(r'^#include "(.+)"\n', lambda m: expand((path.parent / m[1]).resolve()), text, flags=re.M)

    path = (KERNELS / f"{kernel}.metal").resolve()
    return expand(path), path.read_text().partition(BODY)[2]


class MLX:
    """Runs launches by `mx.fast.metal_kernel`, which compiles a kernel at its first use."""

    def __init__(self) -> None:
        import mlx.core

        self.xp = mlx.core
        self._kernels: dict[str, Any] = {}

    def run(self, launch: Launch) -> list[Any]:
        mx = self.xp
        if launch.kernel not in self._kernels:
            header, body = kernel_text(launch.kernel)
            names = {"input_names": list(launch.inputs), "output_names": list(launch.outputs)}
            self._kernels[launch.kernel] = mx.fast.metal_kernel(
                name=f"forgeattention_{launch.kernel}", source=body, header=header, **names
            )
        return self._kernels[launch.kernel](
            inputs=list(launch.inputs.values()),
            template=[(n, getattr(mx, v) if isinstance(v, str) else v) for n, v in launch.template],
            grid=launch.grid,
            threadgroup=launch.threads,
            output_shapes=[shape for shape, _ in launch.outputs.values()],
            output_dtypes=[getattr(mx, dtype) for _, dtype in launch.outputs.values()],
        )


@cache
def mlx_device() -> MLX:
    return MLX()


TILE = 4 * PAGE
"""Tokens that a threadgroup takes at once, a page for each of its simdgroups."""


def split_count(tiles: int) -> int:
    """Threadgroups over which a sequence of so many tiles is split; `split_count` in page.metal."""
    return min((tiles + 1) // 2, 32)


def rows_per_block(rows: int, padded_dim: int) -> int:
    """Rows (queries of the heads of one KV head) that share a read of the pages: the size of the fewest equal blocks
    whose sums fit in registers."""
    most = 4 if padded_dim == 512 else 8
    blocks = -(-rows // most)
    return -(-rows // blocks)


def paged(table: PageTable) -> dict[str, Any]:
    return {"base": table.base, "offsets": table.offsets, "lengths": table.lengths}


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


def constants(codec: Codec, xp: Any) -> CodecArrays:
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


def format_template(codec: Codec) -> list[tuple[str, str | int | bool]]:
    """Template arguments that name the page format: D, K_BITS, K_CODE, V_BITS, V_CODE, SCALES."""
    f = codec.format
    return [
        ("D", f.padded_dim),
        ("K_BITS", f.k_bits),
        ("K_CODE", CODES.index(f.k_code)),
        ("V_BITS", f.v_bits),
        ("V_CODE", CODES.index(f.v_code)),
        ("SCALES", SCALE_FORMATS.index(f.scales)),
    ]


def packed_queries(q: Any, codec: Codec, factor: float, xp: Any) -> tuple[Any, Any, Any]:
    """Queries as the kernels take them, for q [batch, q_heads, n, head_dim].

    Returns:
        A^-T q [batch, q_heads, n, padded_dim], q itself, and q . mu [batch, q_heads, n]: float32, times `factor`.
    """
    c = constants(codec, xp)
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
    c = constants(codec, xp)
    batch, heads, n, width = o.shape
    x = o.reshape(batch, codec.kv_heads, -1, width) @ c.v_inverse.swapaxes(1, 2)
    if c.v_mu is not None:
        x = x + mass.reshape(batch, codec.kv_heads, -1, 1) * c.v_mu.swapaxes(1, 2)
    return x.reshape(batch, heads, n, codec.head_dim)
