"""The subcommands `forgeattn eval ruler` and `forgeattn eval induction`."""

from __future__ import annotations

import argparse
from typing import Any

from ...util.environment import environment
from ...util.progress import progress
from . import induction, ruler
from .setup import caches, setup, spec_from


def run_ruler(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return RULER's scores of the exact and of the packed cache, by task and length."""
    tasks = tuple(args.tasks or ruler.TASKS)
    for task in tasks:
        ruler.check(task)
    if args.samples < 1:
        raise ValueError(f"[ruler] expected --samples >= 1; got {args.samples}")
    made = setup(args)
    makers = {"exact": (made.make_exact, None), "packed": (made.make_packed, "forge")}
    rows: list[dict[str, Any]] = []
    seeds = range(args.seed, args.seed + args.samples)
    needs = {task: max(ruler.least_length(task, made.tokenizer, seed) for seed in seeds) for task in tasks}
    asked = [(task, length) for length in args.lengths for task in tasks]
    # Without names all tasks are asked that have room.
    left_out = [(task, length) for task, length in asked if needs[task] > length and not args.tasks]
    asked = [pair for pair in asked if pair not in left_out]
    for task, length in left_out:
        print(f"{task:<16} {length:>8} tokens: left out, needs at least {needs[task]}", flush=True)
    if not asked:
        raise ValueError(f"[ruler] expected a length of at least {min(needs.values())} tokens; got {max(args.lengths)}")
    samples_of = {
        (task, length): [ruler.make(task, made.tokenizer, length, seed) for seed in seeds] for task, length in asked
    }
    with progress("RULER", 2 * len(asked) * args.samples) as advance:
        for (task, length), samples in samples_of.items():
            row: dict[str, Any] = {"task": task, "length": length, "samples": args.samples}
            for name, (make, implementation) in makers.items():
                said = []
                for sample in samples:
                    said.append(
                        ruler.answer(made.model, made.tokenizer, sample, make(), block=args.block,
                                     implementation=implementation)
                    )  # fmt: skip
                    advance()
                row[name] = ruler.score(task, said, [sample.answers for sample in samples])
                row[f"{name}_texts"] = said
            row["answers"] = [list(sample.answers) for sample in samples]
            rows.append(row)
            print(f"{task:<16} {length:>8} tokens: exact {row['exact']:6.1f}, packed {row['packed']:6.1f}", flush=True)
    means = {name: sum(row[name] for row in rows) / len(rows) for name in makers}
    print(f"mean of {len(rows)}: exact {means['exact']:.1f}, packed {means['packed']:.1f}, at {made.bits:.3f} bits")
    return {
        "rows": rows,
        "left_out": [{"task": task, "length": length, "needs": needs[task]} for task, length in left_out],
        "mean": means,
        "effective_bits": made.bits,
        "seed": args.seed,
        "model": args.model,
        "spec": made.spec.to_json(),
        "env": environment(),
    }


def run_induction(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return what the constructed model recalls from the exact and from the packed cache."""
    import torch

    spec = spec_from(args)
    dtype = getattr(torch, args.dtype or "float32")
    model = induction.build(args.head_dim, twin=args.twin, seed=args.seed, dtype=dtype, device=args.device)
    make_exact, make_packed = caches(model, spec, args.backend)
    makers: dict[str, Any] = {} if args.no_exact else {"exact": (make_exact, None)}
    makers["packed"] = make_packed, "forge"
    rows = []
    for length in args.lengths:
        task = induction.task(length, args.needles, twins=True, seed=args.seed)
        for name, (make, implementation) in makers.items():
            got = induction.recall(model, task, make, implementation=implementation, block=args.block)
            rows.append({"length": length, "cache": name, "found": sum(got.hits), "of": len(got.hits),
                         "least_margin": min(got.margins), **vars(got)})  # fmt: skip
            print(
                f"{length:>8} tokens, {name:<6}: {sum(got.hits)} of {len(got.hits)}, least margin "
                f"{min(got.margins):.3f}, {got.cache_bytes / 1e6:.1f} MB, read in {got.read_seconds:.1f} s",
                flush=True,
            )
    return {
        "rows": rows,
        "head_dim": args.head_dim,
        "twin": args.twin,
        "seed": args.seed,
        "effective_bits": spec.page_format(args.head_dim).effective_bits,
        "spec": spec.to_json(),
        "env": environment(),
    }
