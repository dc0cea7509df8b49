"""Fidelity of caches on a real model: KL, same top token, perplexity, strict needles, generation agreement, canaries.

    python benchmarks/fidelity.py --quick            under 10 minutes on two cores: presets and four peers, few texts
    python benchmarks/fidelity.py --full             every cache, every measure (hours on two cores)
    python benchmarks/fidelity.py --field --kinds text --model FILE.gguf   presets and all peers on another model
    python benchmarks/fidelity.py --full --device cuda --workers 12 --json full.json --plot frontier.png

Caches of this package are the real ones (integrations/hf.py); others are simulated (peer_caches.py). Texts are read in
blocks of 128 tokens (KL) or 256 (needles), as in chunked prefill, and measured over their second halves. A canary is a
model whose keys break lesser caches (canaries.py), measured against its own exact cache.

The work is cut into items (a text's piece, a needle at a length, a prompt, a canary on a text), each measured for all
caches; --workers processes share them. With --journal finished items are kept in a file and not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import canaries
import candidates as caches
import fitted_caches
import torch
from candidates import EXACT
from fidelity_measure import Row, compare, documents, greedy
from fidelity_summary import describe, save, summary
from real_models import identity

from forgeattention import models
from forgeattention.tools.evaluation import niah

NEEDLES = (niah.Needle(), niah.Needle("SILVER COMPASS", "3159"), niah.Needle("CRIMSON LANTERN", "8604"))
TEXTS = ("genesis", "licences", "code", "json")
PROMPTS = 20
PROMPT_TOKENS, NEW_TOKENS = 600, 64
RANDOM_TOKENS = 1024
"""Read by the canaries of random weights."""
CANARY_CACHES = ("exact", "preset", "balanced, not fitted", "scalar 3 bits", "TurboQuant", "origin", "affine", "KIVI")

KINDS = ("needles", "text", "greedy", "canary")

Item = tuple[Any, ...]
"""What is measured at once: ("text", name, piece, ...), ("needles", length, needle), ("greedy", name, prompt, ...) or
("canary", canary, text)."""


def work(args: argparse.Namespace) -> list[Item]:
    """All items, the long ones first."""
    quick = args.set == "quick"
    lengths = [1000] if quick else [2500, 2000, 1500, 1000, 500]
    names = canaries.CANARIES[:: 3 if quick else 1]
    prompts = 0 if quick else math.ceil(PROMPTS / len(args.texts))
    out: dict[str, list[Item]] = {
        "needles": [("needles", n, i) for n in lengths for i in range(1 if quick else len(NEEDLES))],
        "text": [("text", *group) for group in _groups(args.texts, args.windows, args.batch)],
        "greedy": [("greedy", *group) for group in _groups(args.texts, prompts, args.batch)],
        "canary": [("canary", name, text) for name in names for text in args.texts[: 1 if quick else None]]
        + [("canary", name, "random tokens") for name in canaries.RANDOM],
    }
    return [item for kind in args.kinds for item in out[kind]]


def _groups(names: Sequence[str], count: int, batch: int) -> Iterator[tuple[Any, ...]]:
    """(name, up to `batch` of the numbers below `count`); every name comes once before any comes again."""
    for start in range(0, count, batch):
        for name in names:
            yield (name, *range(start, min(start + batch, count)))


class Bench:
    """A loaded model and the caches to measure on it."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_grad_enabled(False)
        self.args = args
        dtype = getattr(torch, args.dtype)
        self.model, self.tokenizer = models.load(args.model, device=args.device, dtype=dtype)
        make = caches.decoded if args.decoded else caches.ours
        exact_tokens = {"sinks": 0, "window": 0} if args.no_exact_tokens else {}
        every = caches.candidates(self.model, args.set, args.backend, make, **exact_tokens)
        if args.fitted:
            wanted = args.only is None or any("calibrated" in name for name in args.only)
            every += fitted_caches.candidates(
                self.model, self.tokenizer, args.backend, calibrated=wanted, **exact_tokens
            )
        every += [caches.calibrated(self.model, file, args.backend, args.decoded) for file in args.calibrations]
        self.candidates = caches.chosen(every, None if args.only is None else [EXACT.name, *args.only])
        self.pieces: dict[str, list[torch.Tensor]] = {}

    def measure(self, item: Item) -> list[Row]:
        """One row for each cache that the item is measured for."""
        kind, *where = item
        rows: dict[str, Row] = getattr(self, f"_{kind}")(*where)
        about = {c.name: {"name": c.name, "kind": c.kind, "bits": c.effective_bits} for c in self.candidates}
        return [{"item": list(item), **about[name], **row} for name, row in rows.items()]

    def _text(self, name: str, *pieces: int) -> dict[str, Row]:
        ids = torch.stack([self.piece(name, piece) for piece in pieces])
        return compare(self.model, ids, self.candidates, self.args.block, start=self.args.start)

    def _needles(self, length: int, number: int) -> dict[str, Row]:
        hay, needle = niah.haystack(self.tokenizer, length), NEEDLES[number]
        prompts = {depth: niah.prompt(self.tokenizer, niah.place(hay, needle, depth)) for depth in niah.DEPTHS}
        out: dict[str, Row] = {}
        for candidate in self.candidates:
            if candidate.kind == "variant":
                continue
            out[candidate.name] = {"needle": needle.answer, "cells": (cells := {})}
            for batch in same_length(prompts, self.args.batch):
                ids = torch.cat([prompts[depth] for depth in batch]).to(self.model.device)
                said = self.tokenizer.batch_decode(greedy(self.model, ids, candidate, 24), skip_special_tokens=True)
                for depth, text in zip(batch, said, strict=True):
                    cells[f"{depth}"] = niah.judge(text, needle, hay=hay).value
        return out

    def _greedy(self, name: str, *numbers: int) -> dict[str, Row]:
        rows = []
        for number in numbers:
            piece = self.piece(name, number % self.args.windows)
            start = number * max(0, len(piece) - PROMPT_TOKENS) // PROMPTS
            rows.append(piece[start : start + PROMPT_TOKENS])
        ids = torch.stack(rows).to(self.model.device)
        wanted = greedy(self.model, ids, EXACT, NEW_TOKENS)
        out = {}
        for candidate in self.candidates:
            if candidate.kind != "variant":
                other = greedy(self.model, ids, candidate, NEW_TOKENS) != wanted
                first = [(*row.tolist(), True).index(True) for row in other]
                out[candidate.name] = {"first_divergence": first, "of": NEW_TOKENS}
        return out

    def _canary(self, name: str, text: str) -> dict[str, Row]:
        model = canaries.make(name, self.model)
        ids = canaries.random_tokens(RANDOM_TOKENS) if name in canaries.RANDOM else self.piece(text, 0)
        return compare(model, ids[None], [c for c in self.candidates if c.name.startswith(CANARY_CACHES)])

    def piece(self, name: str, number: int) -> torch.Tensor:
        """One of the pieces of a text: int64 [tokens]."""
        if name not in self.pieces:
            self.pieces |= documents(self.tokenizer, self.args.windows, self.args.length, [name])
        return self.pieces[name][number]


def same_length(prompts: dict[float, torch.Tensor], most: int) -> list[list[float]]:
    """The keys of prompts [1, tokens] in groups of one length, of at most so many."""
    groups: dict[int, list[float]] = {}
    for key, ids in prompts.items():
        groups.setdefault(ids.shape[1], []).append(key)
    return [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]


_bench: Bench


def _start(args: argparse.Namespace) -> None:
    global _bench
    _bench = Bench(args)


def _measure(item: Item) -> tuple[Item, list[Row], float]:
    start = time.time()
    return item, _bench.measure(item), time.time() - start


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all items that the journal does not hold, as far as `args.minutes` reach, and sum up."""
    every, until = work(args), time.time() + 60 * (args.minutes or math.inf)
    done: dict[Item, list[Row]] = {}
    if args.journal and args.journal.is_file():
        for line in args.journal.read_text().splitlines():
            rows = json.loads(line)
            done[tuple(rows[0]["item"])] = rows
    left = [item for item in every if item not in done]

    def finish(item: Item, rows: list[Row], seconds: float) -> None:
        done[item] = rows
        print(f"{len(done)}/{len(every)} {' '.join(map(str, item))}: {seconds:.0f} s", flush=True)
        if args.journal:
            with args.journal.open("a") as file:
                file.write(json.dumps(rows) + "\n")

    if args.workers == 1:
        if left:
            _start(args)
        for item in left:
            if time.time() < until:
                finish(*_measure(item))
    else:
        with torch.multiprocessing.get_context("spawn").Pool(args.workers, _start, (args,)) as pool:
            for result in pool.imap_unordered(_measure, left):
                finish(*result)
                if time.time() > until:
                    break
    result = summary(args, [row for item in every for row in done.get(item, [])])
    for row in result["rows"]:
        print(describe(row))
    for row in result["canaries"]:
        print(f"{row['canary']:32s} {row['name']:44s} KL {row['kl']:.5f}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    for name in caches.SETS:
        size.add_argument(f"--{name}", action="store_const", const=name, dest="set", help="which caches")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--backend", default="auto", help="kernels of our caches (default auto)")
    parser.add_argument("--only", nargs="+", help="caches of these names, or PART* for all that hold it")
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), help="names or files (default %(default)s)")
    parser.add_argument("--windows", type=int, help="pieces of each text (default: 1 or 4)")
    parser.add_argument("--length", type=int, help="tokens of a piece (default: 1152 or 2048)")
    parser.add_argument("--block", type=int, default=128, help="tokens read at once (default 128)")
    parser.add_argument("--start", type=int, help="first position measured (default: half of a piece)")
    parser.add_argument("--no-exact-tokens", action="store_true", help="no exact first or newest tokens, for anybody")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what is measured")
    parser.add_argument("--batch", type=int, default=1, help="documents or prompts of one length read at once")
    parser.add_argument("--calibrations", type=Path, nargs="+", default=[], metavar="FILE", help="also measure these")
    parser.add_argument("--fitted", action="store_true", help="also caches that are fitted to the model by a text")
    parser.add_argument("--decoded", action="store_true", help="read pages through decode_pages and stock attention")
    parser.add_argument("--workers", type=int, default=1, help="processes; set OMP_NUM_THREADS=1 with several")
    parser.add_argument("--journal", type=Path, help="where finished items are kept and looked for")
    parser.add_argument("--minutes", type=float, help="begin no item later; sum up what there is")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    args.set = args.set or "full"
    args.windows = args.windows or (1 if args.set == "quick" else 4)
    args.length = args.length or (1152 if args.set == "quick" else 2048)
    start = time.time()
    result = run(args) | identity(args.model) | {"seconds": time.time() - start, "cpu_seconds": sum(os.times()[:4])}
    save(result, args.json, args.plot)


if __name__ == "__main__":
    main()
