"""How Metal kernels are launched: their text, the device that runs them, the shape of a launch."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from ...codec.codec import Codec
from ...codec.spec import CODES, PAGE, SCALE_FORMATS
from ...ops.table import PageTable
from .plan import gpu_name, most_rows

KERNELS = Path(__file__).parents[2] / "kernels" / "metal"
BODY = "//! body\n"
"""The line in a kernel's file after which the body of the kernel function begins; MLX writes its signature."""
OLDEST_MACOS = 14
"""The oldest macOS for which MLX is built; it compiles with Metal 3.1 there, which the kernels keep to."""
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
    """Rows (queries of the heads of one KV head) that share a read of the pages: the size of the fewest equal blocks of
    at most `plan.most_rows`."""
    blocks = -(-rows // most_rows(padded_dim))
    return -(-rows // blocks)


FEWEST = 8
"""An input of fewer elements is passed in constant memory (mlx/backend/common/metal_kernel.cpp), which makes another
kernel of it: one that grows past this would have it compiled in the middle of a generation."""


def roomy(x: Any, xp: Any) -> Any:
    """An array of at least `FEWEST` elements that begins with those of x, for inputs whose shape the kernel does not
    read."""
    if x.size >= FEWEST:
        return x
    return xp.concatenate([x.reshape(-1), xp.zeros((FEWEST - x.size,), dtype=x.dtype)])


def paged(table: PageTable, xp: Any) -> dict[str, Any]:
    """A page table as the kernels' inputs."""
    page_table = table.page_table
    if page_table.size < FEWEST:
        more = FEWEST - page_table.shape[1]
        page_table = xp.concatenate([page_table, xp.zeros((page_table.shape[0], more), dtype=page_table.dtype)], axis=1)
    return {"base": table.base, "page_table": page_table, "lengths": roomy(table.lengths, xp)}


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


def available_to_mlx() -> tuple[bool, str]:
    """Whether this process can launch Metal kernels, and why."""
    try:
        import mlx.core as mx
    except ImportError as error:
        return False, f"MLX is not installed ({error})"
    name = gpu_name()
    if name is None:
        return False, f"MLX {mx.__version__} without a Metal device"
    system = platform.mac_ver()[0]
    if system and int(system.partition(".")[0]) < OLDEST_MACOS:
        return False, f"macOS {system}, and the kernels need {OLDEST_MACOS} or newer"
    return True, f"MLX {mx.__version__} on {name}, macOS {system} ({OLDEST_MACOS} is the oldest)"
