"""Needles at any length without a trained model: the constructed induction model on exact and packed caches.

    python benchmarks/induction.py --device cuda --dtype bfloat16 --lengths 300000 1000000 --json induction.json
    python benchmarks/induction.py --lengths 4096 16384 65536
    python benchmarks/induction.py --caches exact balanced "balanced sparse=top_k=2048" "balanced evict=v3:0.5:host"

Reading is quadratic in the length; on a CPU 64K tokens take some minutes. Every run says what it held and how long it
took, or that it did not fit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from forgeattention.codec.presets import PRESETS
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.tools.evaluation import induction
from forgeattention.util.environment import environment
from forgeattention.util.files import write_json


def maker(model: Any, text: str) -> tuple[Callable[[], Any], str | None, float]:
    """What makes the cache that `text` names, its attention implementation and its bits per element.

    Args:
        model: the constructed model.
        text: "exact", or a preset and perhaps sparse=RULE and evict=POLICY, as `forgeattn eval` takes them.

    Raises:
        ValueError: anything else.
    """
    if text == "exact":
        return lambda: DynamicCache(config=model.config), None, 8.0 * model.dtype.itemsize
    preset, *options = text.split()
    if preset not in PRESETS:
        raise ValueError(f"[induction] expected exact or a preset of {list(PRESETS)}; got {text!r}")
    given: dict[str, Any] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name == "sparse":
            from forgeattention.sparse import SparseSpec

            given["sparse"] = SparseSpec.parse(value)
        elif name == "evict":
            from forgeattention.eviction import Eviction

            given["eviction"] = Eviction.parse(value)
        else:
            raise ValueError(f"[induction] expected sparse=RULE or evict=POLICY; got {option!r}")
    spec = PRESETS[preset]
    bits = spec.page_format(model.config.head_dim).effective_bits
    return lambda: ForgeCache(model, spec, **given), "forge", bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384], metavar="TOKENS")
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128))
    parser.add_argument("--caches", nargs="+", default=["exact", *PRESETS], metavar="CACHE")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument(
        "--twin", type=float, default=0.8, help="cosine of every key's distractor (default %(default)s)"
    )
    parser.add_argument("--block", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    model = induction.build(args.head_dim, twin=args.twin, seed=args.seed, dtype=dtype, device=args.device)
    caches = {text: maker(model, text) for text in args.caches}
    rows = []
    for length in args.lengths:
        task = induction.task(length, args.pairs, twins=True, seed=args.seed)
        for name, (make, implementation, bits) in caches.items():
            made: list[Any] = []

            def make_one(make: Callable[[], Any] = make, made: list[Any] = made) -> Any:
                made.append(make())
                return made[-1]

            try:
                got = induction.recall(model, task, make_one, implementation=implementation, block=args.block)
            except torch.OutOfMemoryError as error:
                print(f"{length:>9} {name:<36} does not fit: {str(error).splitlines()[0]}", flush=True)
                rows.append({"length": length, "cache": name, "error": "out of memory"})
                continue
            rows.append(
                {"length": length, "cache": name, "bits": bits, "found": sum(got.hits), "of": len(got.hits),
                 "least_margin": min(got.margins), "cache_bytes": got.cache_bytes, "read_seconds": got.read_seconds,
                 "ask_seconds": got.ask_seconds, "hits": got.hits, "margins": got.margins, "depths": got.depths}
            )  # fmt: skip
            if "evict=" in name:
                rows[-1]["eviction"] = made[0].report()["eviction"]
            print(
                f"{length:>9} {name:<36} {bits:6.3f} bits  found {sum(got.hits)}/{len(got.hits)}  least margin "
                f"{min(got.margins):.4f}  {got.cache_bytes / 1e6:9.1f} MB  read {got.read_seconds:8.2f} s  ask "
                f"{got.ask_seconds / len(got.hits) * 1e3:8.2f} ms",
                flush=True,
            )
            if args.json:
                setting = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
                env = environment() | ({"device": torch.cuda.get_device_name()} if args.device == "cuda" else {})
                write_json(args.json, {"rows": rows, "setting": setting, "env": env})


if __name__ == "__main__":
    main()
