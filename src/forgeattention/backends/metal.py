"""MLX arrays on Apple GPUs: launches the kernels of kernels/metal through `mx.fast.metal_kernel`.

Rotations, centres and dtype casts are MLX operations around the kernels. The launch arithmetic knows only shapes, so
the tests run the same code with NumPy arrays and an emulator for a device.
"""

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
from ..codec.spec import CODES, PAGE, SCALE_FORMATS
from ..ops.arrays import dtype_of
from ..ops.table import ExactTokens, PageTable

KERNELS = Path(__file__).parent.parent / "kernels" / "metal"
LOG2E = 1.4426950408889634
TILE = 4 * PAGE
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
    """Header and body of a kernel for `mx.fast.metal_kernel`, with its includes put in place, each once."""
    seen: set[Path] = set()

    def expand(path: Path) -> str:
        if path in seen:
            return ""
        seen.add(path)
        text = path.read_text().replace("#pragma once\n", "")
        return re.sub(r'^#include "(.+)"\n', lambda m: expand((path.parent / m[1]).resolve()), text, flags=re.M)

    header, body = expand((KERNELS / f"{kernel}.metal").resolve()).split("//! body\n")
    return header, body


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


def available() -> tuple[bool, str]:
    """Whether this process can launch Metal kernels, and why."""
    try:
        import mlx.core as mx
    except ImportError as error:
        return False, f"MLX is not installed ({error})"
    if not mx.metal.is_available():
        return False, f"MLX {mx.__version__} without a Metal device"
    return True, f"MLX {mx.__version__} on {mx.metal.device_info()['device_name']}"


@dataclass(frozen=True)
class CodecArrays:
    """A codec's constants on a device: levels [16] f32, k_inverse and v_inverse [heads, head_dim, padded_dim] f32 with
    x = inverse y + mu, mu [heads, head_dim, 1] f32 or None."""

    k_levels: Any
    v_levels: Any
    k_inverse: Any
    v_inverse: Any
    k_mu: Any | None
    v_mu: Any | None


_constants: WeakKeyDictionary[Codec, dict[int, CodecArrays]] = WeakKeyDictionary()


def constants(codec: Codec, xp: Any) -> CodecArrays:
    """The codec's constants as arrays of `xp`, made once."""
    cached = _constants.setdefault(codec, {})
    if id(xp) not in cached:
        levels = [np.resize(b.values, 16).astype(np.float32) for b in (codec.k_codebook, codec.v_codebook)]
        sides = (codec.k_transform, codec.v_transform)
        inverse = [np.ascontiguousarray(t.inverse[:, : codec.head_dim]) for t in sides]
        mu = [None if t.mu is None else np.ascontiguousarray(t.mu[:, : codec.head_dim, None]) for t in sides]
        cached[id(xp)] = CodecArrays(*(None if a is None else xp.array(a) for a in (*levels, *inverse, *mu)))
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


def split_count(tiles: int) -> int:
    """Threadgroups over which a sequence of so many tiles is split; `split_count` in page.metal."""
    return min((tiles + 1) // 2, 32)


def rows_per_block(rows: int, most: int) -> int:
    """The size of equal blocks, at most `most` each, that cover the rows with the fewest blocks."""
    blocks = -(-rows // most)
    return -(-rows // blocks)


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


def _table(table: PageTable | None, batch: int, xp: Any) -> PageTable:
    if table is not None and table.base is None:
        raise ValueError("[metal] expected a page table with a base array; got absolute addresses")
    if table is not None:
        return table
    nothing = xp.zeros((batch,), dtype=xp.int32)
    return PageTable(xp.zeros((16,), dtype=xp.uint8), xp.zeros((batch, 1), dtype=xp.int64), nothing, 0)


def _pages(table: PageTable) -> dict[str, Any]:
    return {"base": table.base, "offsets": table.offsets, "lengths": table.lengths}


def decode_attention(
    q: Any,
    codec: Codec,
    table: PageTable | None,
    exact: ExactTokens | None,
    scale: float,
    causal: bool,
    sink_logits: Any | None,
    device: Device | None = None,
) -> tuple[Any, Any]:
    """See `forgeattention.ops.decode_attention`."""
    device = device or mlx_device()
    xp = device.xp
    batch, heads, n, dim = q.shape
    kv_heads, rows = codec.kv_heads, heads // codec.kv_heads * n
    padded = codec.format.padded_dim
    c = constants(codec, xp)
    rotated, plain, bias = packed_queries(q, codec, scale * LOG2E, xp)
    table = _table(table, batch, xp)
    if exact is None:
        nothing = xp.zeros((batch, kv_heads, 1, dim), dtype=xp.float32)
        exact = ExactTokens(nothing, nothing, xp.zeros((batch,), dtype=xp.int32), 0)
    splits = max(1, split_count(-(-table.max_length // TILE)))
    block = rows_per_block(rows, 4 if padded == 512 else 8)
    packed_o, packed_ml, exact_o, exact_ml = device.run(
        Launch(
            "decode_attention",
            {
                "q": rotated,
                "q_exact": plain,
                "bias": bias,
                **_pages(table),
                "exact_k": exact.k,
                "exact_v": exact.v,
                "exact_lengths": exact.lengths,
                "k_levels": c.k_levels,
                "v_levels": c.v_levels,
            },
            {
                "packed_o": ((batch, kv_heads, splits, rows, padded), "float32"),
                "packed_ml": ((batch, kv_heads, splits, rows, 2), "float32"),
                "exact_o": ((batch, kv_heads, 4, rows, dim), "float32"),
                "exact_ml": ((batch, kv_heads, 4, rows, 2), "float32"),
            },
            (1 + splits, -(-rows // block), batch * kv_heads),
            [*format_template(codec), ("T", dtype_of(exact.k)), ("DIM", dim), ("ROWS", block), ("CAUSAL", causal)],
        )
    )
    if sink_logits is None:
        sink_logits = xp.full((heads,), -xp.inf, dtype=xp.float32)
    of_packed, of_exact, mass, lse = device.run(
        Launch(
            "merge_attention",
            {
                "packed_o": packed_o,
                "packed_ml": packed_ml,
                "exact_o": exact_o,
                "exact_ml": exact_ml,
                "sinks": sink_logits,
            },
            {
                "out_packed": ((batch, heads, n, padded), "float32"),
                "out_exact": ((batch, heads, n, dim), "float32"),
                "mass": ((batch, heads, n), "float32"),
                "lse": ((batch, heads, n), "float32"),
            },
            (1, rows, batch * kv_heads),
            [("D", padded), ("DIM", dim), ("N", n)],
            (padded, 1, 1),
        )
    )
    return (unpacked_values(of_packed, mass, codec, xp) + of_exact).astype(q.dtype), lse


def qk_scores(q: Any, codec: Codec, table: PageTable, scale: float, device: Device | None = None) -> Any:
    """See `forgeattention.ops.qk_scores`."""
    device = device or mlx_device()
    xp = device.xp
    batch, heads, n, _ = q.shape
    rows = heads // codec.kv_heads * n
    block = rows_per_block(rows, 4 if codec.format.padded_dim == 512 else 8)
    if table.max_length == 0 or batch == 0 or n == 0:
        return xp.zeros((batch, heads, n, table.max_length), dtype=xp.float32)
    rotated, _, bias = packed_queries(q, codec, scale, xp)
    inputs = {"q": rotated, "bias": bias, **_pages(table), "k_levels": constants(codec, xp).k_levels}
    (scores,) = device.run(
        Launch(
            "qk_scores",
            {**inputs, "max_length": xp.array(table.max_length, dtype=xp.int32)},
            {"scores": ((batch, heads, n, table.max_length), "float32")},
            (-(-table.max_length // TILE), -(-rows // block), batch * codec.kv_heads),
            [*format_template(codec), ("ROWS", block), ("KV_HEADS", codec.kv_heads)],
        )
    )
    return scores


def value_sum(p: Any, codec: Codec, table: PageTable, skip: bool = True, device: Device | None = None) -> Any:
    """See `forgeattention.ops.value_sum`. Weights are not checked to be finite: that would wait for the GPU.

    Args:
        p, codec, table: as there.
        skip: leave out pages and groups of 16 tokens whose weights are all zero; else read every page.
        device: what runs the kernel, MLX if None.
    """
    device = device or mlx_device()
    xp = device.xp
    batch, heads, n, length = p.shape
    rows, padded = heads // codec.kv_heads * n, codec.format.padded_dim
    block = rows_per_block(rows, 4 if padded == 512 else 8)
    if length == 0 or batch == 0 or n == 0:
        return xp.zeros((batch, heads, n, codec.head_dim), dtype=xp.float32)
    splits = split_count(-(-length // TILE))
    sums, mass = device.run(
        Launch(
            "value_sum",
            {"p": p, **_pages(table), "v_levels": constants(codec, xp).v_levels},
            {
                "sums": ((batch, codec.kv_heads, splits, rows, padded), "float32"),
                "mass": ((batch, codec.kv_heads, splits, rows), "float32"),
            },
            (splits, -(-rows // block), batch * codec.kv_heads),
            [*format_template(codec), ("ROWS", block), ("SKIP", skip), ("KV_HEADS", codec.kv_heads)],
        )
    )
    sums, mass = sums.sum(2).reshape(batch, heads, n, padded), mass.sum(2).reshape(batch, heads, n)
    return unpacked_values(sums, mass, codec, xp)


def decode_pages(
    codec: Codec, table: PageTable, dtype: str, rotated: bool, device: Device | None = None
) -> tuple[Any, Any]:
    """See `forgeattention.ops.decode_pages`."""
    device = device or mlx_device()
    xp = device.xp
    batch, width = table.lengths.shape[0], codec.format.padded_dim
    c = constants(codec, xp)
    if table.max_length == 0 or batch == 0:
        empty = xp.zeros((batch, codec.kv_heads, table.max_length, width if rotated else codec.head_dim))
        return (empty.astype(getattr(xp, dtype)),) * 2
    stored = dtype if rotated else "float32"
    shape = (batch, codec.kv_heads, table.max_length, width)
    k, v = device.run(
        Launch(
            "decode_pages",
            {
                **_pages(table),
                "k_levels": c.k_levels,
                "v_levels": c.v_levels,
                "max_length": xp.array(table.max_length, dtype=xp.int32),
            },
            {"k": (shape, stored), "v": (shape, stored)},
            (-(-table.max_length // TILE), 1, batch * codec.kv_heads),
            [*format_template(codec), ("T", stored), ("KV_HEADS", codec.kv_heads)],
        )
    )
    if rotated:
        return k, v
    valid = (xp.arange(table.max_length) < table.lengths[:, None])[:, None, :, None]
    out = []
    for y, inverse, mu in ((k, c.k_inverse, c.k_mu), (v, c.v_inverse, c.v_mu)):
        x = y @ inverse.swapaxes(1, 2)
        if mu is not None:
            x = xp.where(valid, x + mu.swapaxes(1, 2), 0.0)
        out.append(x.astype(getattr(xp, dtype)))
    return out[0], out[1]
