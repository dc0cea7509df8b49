"""`forgeattn plan`: how much context a model's caches leave room for, from its config alone."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..codec.presets import PRESETS
from ..codec.spec import CodecSpec
from ..models.shape import Model, inspect, read_config
from ..util.sizes import parse_memory

APPLE_GB = (8, 16, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)
NVIDIA_GB = (8, 12, 16, 24, 32, 48, 80, 96, 141, 180, 288)
# Metal's recommendedMaxWorkingSetSize: about two thirds of the memory up to 32 GB, three quarters above.
APPLE_SHARE = ((32, 0.66), (10**9, 0.75))
# A CUDA context, its kernels and the allocator's fragments.
NVIDIA_RESERVED = 10**9
# Bits per cached element: q8_0 is 32 int8 and an fp16 scale; affine 4-bit is 64 codes, an fp16 scale and an fp16 bias.
AFFINE_BITS = {"8-bit (q8_0)": 8.5, "4-bit (affine, groups of 64)": 4.5}


@dataclass(frozen=True)
class Row:
    """One cache in one memory size.

    Attributes:
        context: the longest in tokens, 0 if the weights alone do not fit, None if nothing grows with the context.
        cache_bytes: of the cache at that context.
        bytes_per_token: what one more token costs at great length.
    """

    cache: str
    memory: int
    context: int | None
    cache_bytes: int
    bytes_per_token: float


def longest(model: Model, memory: int, cache_bytes: Any) -> int | None:
    """The most tokens for which weights, working set and `cache_bytes(tokens)` fit into `memory` bytes; 0 if none do,
    None if any number does."""
    room = memory - model.weight_bytes - model.working_bytes()
    if cache_bytes(1) > room:
        return 0
    low, high = 1, 2
    while cache_bytes(high) <= room:
        if high > 2**40:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cache_bytes(middle) <= room else (low, middle)
    return low


def rows(model: Model, memory: int, specs: Mapping[str, CodecSpec]) -> list[Row]:
    """The longest context in `memory` bytes for the exact cache, common 8- and 4-bit ones and ours."""
    counts: dict[str, Any] = {"exact": model.exact_bytes}
    for name, bits in AFFINE_BITS.items():
        counts[name] = lambda tokens, bits=bits: model.affine_bytes(tokens, bits)
    for name, spec in specs.items():
        counts[name] = lambda tokens, spec=spec: model.packed_bytes(tokens, spec)
    out = []
    for name, count in counts.items():
        context = longest(model, memory, count)
        far = 2**24
        out.append(Row(name, memory, context, count(context or 0), (count(2 * far) - count(far)) / far))
    return out


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return the longest contexts of a model in one memory size, or in the usual ones."""
    from ..util.environment import environment
    from .evaluation.setup import asks_for_spec, spec_from

    model = _inspect(args)
    specs = {"packed": spec_from(args)} if asks_for_spec(args) else dict(PRESETS)
    machines = memory_of(args.memory) if args.memory else machine_sizes()
    table = {machine: rows(model, usable, specs) for machine, usable in machines.items()}
    names = [row.cache for row in next(iter(table.values()))]
    kinds = [layer.kind for layer in model.layers]
    print(
        f"{args.model}: {model.parameters / 1e9:.3f} G parameters, weights {model.weight_bytes / 1e9:.2f} GB, "
        f"working set about {model.working_bytes() / 1e9:.2f} GB, layers: "
        + ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        + (f"; made for {model.positions:,} positions" if model.positions else "")
    )
    width = [max(len(name), 13) for name in names]
    labels = {name: f"{name} ({usable / 1e9:.1f} GB to fill)" for name, usable in machines.items()}
    head = max(len(name) for name in (*labels.values(), "bytes per token", "memory"))
    print(f"{'memory':<{head}}  " + "  ".join(f"{name:>{w}}" for name, w in zip(names, width)))
    for machine, line in table.items():
        cells = (f"{_context(row.context):>{w}}" for row, w in zip(line, width))
        print(f"{labels[machine]:<{head}}  " + "  ".join(cells))
    last = next(iter(table.values()))
    print(
        f"{'bytes per token':<{head}}  " + "  ".join(f"{row.bytes_per_token:>{w},.0f}" for row, w in zip(last, width))
    )
    return {
        "model": args.model,
        "parameters": model.parameters,
        "weight_bytes": model.weight_bytes,
        "working_bytes": model.working_bytes(),
        "positions": model.positions,
        "layers": [asdict(layer) for layer in model.layers],
        "specs": {name: spec.to_json() for name, spec in specs.items()},
        "machines": {machine: [asdict(row) for row in line] for machine, line in table.items()},
        "env": environment(),
    }


def machine_sizes() -> dict[str, int]:
    """Bytes that a model may use on machines of the usual sizes."""
    apple = dict(_apple(size) for size in APPLE_GB)
    return apple | dict(_nvidia(size) for size in NVIDIA_GB)


def memory_of(text: str) -> dict[str, int]:
    """What `--memory` means, by its name in the table: of "apple 16GB" or "nvidia 24GB" the share that a model may use,
    of a size alone all of it.

    Raises:
        ValueError: neither.
    """
    if found := re.fullmatch(r"\s*(apple|nvidia)\s+(\d+)\s*GB\s*", text, re.IGNORECASE):
        return dict([_apple(int(found[2])) if found[1].lower() == "apple" else _nvidia(int(found[2]))])
    return {text: parse_memory(text)}


def _apple(size: int) -> tuple[str, int]:
    usable = int(size * 10**9 * next(share for top, share in APPLE_SHARE if size <= top))
    return f"Apple {size} GB", usable


def _nvidia(size: int) -> tuple[str, int]:
    usable = size * 10**9 - NVIDIA_RESERVED
    return f"NVIDIA {size} GB", usable


def _inspect(args: argparse.Namespace) -> Model:
    """The model as transformers lays it out, or mlx-lm where torch is missing or `--engine mlx` asks for it."""
    if args.engine == "mlx" or (args.engine is None and importlib.util.find_spec("torch") is None):
        from ..models import shape_mlx

        return shape_mlx.inspect(shape_mlx.read_config(args.model), weight_bits=args.weight_bits)
    return inspect(read_config(args.model), weight_bits=args.weight_bits)


def _context(tokens: int | None) -> str:
    if tokens is None:
        return "any"
    return "no room" if tokens == 0 else f"{tokens:,}"
