"""`forgeattn report`: runs a chosen set of measures and writes one page, its charts and their JSON."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from ...codec.presets import DEFAULT, PRESETS
from ...models.shape import head_dim
from ...util.environment import environment
from ...util.files import write_json
from . import kl, memory, model_pages, niah, page, texts
from .commands import niah_result
from .setup import Setup, asks_for_spec, caches, setup
from .streaming import attention, first_tokens, opened, step, tokenise

PARTS = ("niah", "kl", "memory", "speed")
SPEED_STEPS = 12
MEASURING = ("model", "preset", "k_bits", "v_bits", "device", "dtype", "backend", "parts", "test", "lengths", "depths",
             "text", "kl_length", "contexts", *page.TITLES)  # fmt: skip
"""Options that say what is measured."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts asked for, add the results of other runs, and write report.html, report.json and PNGs; or make
    pages of `--results` alone.

    Raises:
        ValueError: `--results` beside options that say what to measure; files without what is asked of them.
    """
    if args.results:
        given = [name for name in MEASURING if getattr(args, name) != args.default_of(name)]
        if given:
            names = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"[report] expected --results without options that say what to measure; got {names}")
        return model_pages.run(args.results, args.output)
    added = {name: _rows(file) for name in page.TITLES if (file := getattr(args, name)) is not None}
    made = setup(args)
    result: dict[str, Any] = {
        "model": args.model,
        "preset": (args.preset or DEFAULT) if args.k_bits is None and args.v_bits is None else "as asked",
        "effective_bits": made.bits,
        "spec": made.spec.to_json(),
        "env": environment(),
        **added,
    }
    if "niah" in args.parts:
        result["niah"] = _needles(made, args)
    if "kl" in args.parts:
        result["kl"] = _fidelity(made, args)
    if {"memory", "speed"} & set(args.parts):
        held, speed = _contexts(made, args)
        result |= {name: rows for name, rows in (("memory", held), ("speed", speed)) if name in args.parts}
    args.output.mkdir(parents=True, exist_ok=True)
    filled, charts = page.render(result)
    write_json(args.output / "report.json", result)
    for name, png in charts.items():
        (args.output / f"{name}.png").write_bytes(png)
    (args.output / "report.html").write_text(filled, encoding="utf-8")
    print(page.verdict(result))
    print(f"Report: {args.output / 'report.html'}, report.json" + "".join(f", {name}.png" for name in charts))
    return result


def _rows(file: Path) -> list[dict[str, Any]]:
    """The `rows` of another run's JSON. Raises ValueError if it has none."""
    content = model_pages.read_result(file)
    rows = content.get("rows") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"[report] expected a list of rows in {str(file)!r}; got {type(rows).__name__}")
    return rows


def _needles(made: Setup, args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for test in args.test:
        for document in niah.documents(test, made.tokenizer, args.lengths, depths=args.depths):
            exact = niah.ask(made.model, made.tokenizer, document, made.make_exact)
            packed = niah.ask(made.model, made.tokenizer, document, made.make_packed, implementation="forge")
            rows += [(test, one, other) for one, other in zip(exact, packed, strict=True)]
    return niah_result(rows)


def _fidelity(made: Setup, args: argparse.Namespace) -> list[dict[str, Any]]:
    """KL of every preset, and of the spec asked for where it is none."""
    ids = tokenise(made.tokenizer, texts.read(args.text))
    pieces = kl.windows(ids, args.kl_length, 1, first_tokens(made.tokenizer))
    specs = (
        dict(PRESETS) if made.spec in PRESETS.values() or not asks_for_spec(args) else PRESETS | {"as asked": made.spec}
    )
    rows = []
    for name, spec in specs.items():
        _, make = caches(made.model, spec, args.backend)
        got = kl.compare(made.model, pieces, make, implementation="forge")
        rows.append(
            {"preset": name, "bits": spec.page_format(head_dim(made.model)).effective_bits, "kl": got.kl,
             "same_top": got.same_top, "perplexity": got.perplexity, "exact_perplexity": got.exact_perplexity,
             "positions": got.positions, "text": args.text}
        )  # fmt: skip
    return rows


@torch.no_grad()
def _contexts(made: Setup, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measured bytes, and tokens decoded per second (median step), of both caches at growing contexts."""
    ids = tokenise(made.tokenizer, texts.enough("mixed", 8 * max(args.contexts)))
    tokens = opened(ids[None, : max(args.contexts)], first_tokens(made.tokenizer)).to(made.model.device)
    held: dict[int, dict[str, int]] = {n: {} for n in sorted(args.contexts)}
    speed: dict[int, dict[str, float]] = {n: {} for n in sorted(args.contexts)}
    for name, make, implementation in (("exact", made.make_exact, None), ("packed", made.make_packed, "forge")):
        cache, read = make(), 0
        with attention(made.model, implementation):
            for context in held:
                while read < context - SPEED_STEPS:
                    stop = min(read + 512, context - SPEED_STEPS)
                    step(made.model, tokens[:, read:stop], cache, keep=1)
                    read = stop
                seconds = []
                while read < context:
                    start = time.perf_counter()
                    float(step(made.model, tokens[:, read : read + 1], cache, keep=1)[0, -1, 0])
                    seconds.append(time.perf_counter() - start)
                    read += 1
                held[context][name] = memory.cache_bytes(cache)
                speed[context][name] = 1 / sorted(seconds)[len(seconds) // 2]
    return [{"context": n, **row} for n, row in held.items()], [{"context": n, **row} for n, row in speed.items()]
