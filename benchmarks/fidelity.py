"""Fidelity of caches on a real model: KL, same top token, perplexity, strict needles, generation agreement, canaries.

    python benchmarks/fidelity.py --quick            under 10 minutes on two cores: presets and four peers, few texts
    python benchmarks/fidelity.py --full             every cache, every measure (hours on two cores)
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
import torch
from candidates import EXACT, Candidate
from fidelity_summary import describe, save, summary

from forgeattention import models
from forgeattention.models.shape import head_dim
from forgeattention.tools.evaluation import niah, texts
from forgeattention.tools.evaluation.streaming import attention, spans, step

NEEDLES = (niah.Needle(), niah.Needle("SILVER COMPASS", "3159"), niah.Needle("CRIMSON LANTERN", "8604"))
TEXTS = ("genesis", "licences", "code", "json")
BLOCK = 128
PROMPTS = 20
PROMPT_TOKENS, NEW_TOKENS = 600, 64
RANDOM_TOKENS = 1024
"""Read by the canaries of random weights."""
CANARY_CACHES = ("exact", "preset", "balanced, not fitted", "scalar 3 bits", "TurboQuant", "origin", "affine", "KIVI")

KINDS = ("needles", "text", "greedy", "canary")

Item = tuple[Any, ...]
"""What is measured at once: ("text", name, piece, ...), ("needles", length, needle), ("greedy", name, prompt, ...) or
("canary", canary, text)."""
Row = dict[str, Any]


def work(args: argparse.Namespace) -> list[Item]:
    """All items, the long ones first."""
    lengths = [1000] if args.quick else [2500, 2000, 1500, 1000, 500]
    names = canaries.CANARIES[:: 3 if args.quick else 1]
    prompts = 0 if args.quick else math.ceil(PROMPTS / len(args.texts))
    out: dict[str, list[Item]] = {
        "needles": [("needles", n, i) for n in lengths for i in range(1 if args.quick else len(NEEDLES))],
        "text": [("text", *group) for group in _groups(args.texts, args.windows, args.batch)],
        "greedy": [("greedy", *group) for group in _groups(args.texts, prompts, args.batch)],
        "canary": [("canary", name, text) for name in names for text in args.texts[: 1 if args.quick else None]]
        + [("canary", name, "random tokens") for name in canaries.RANDOM],
    }
    return [item for kind in args.kinds for item in out[kind]]


def _groups(names: Sequence[str], count: int, batch: int) -> Iterator[tuple[Any, ...]]:
    """(name, up to `batch` of the numbers below `count`)."""
    for name in names:
        for start in range(0, count, batch):
            yield (name, *range(start, min(start + batch, count)))


class Bench:
    """A loaded model and the caches to measure on it."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_grad_enabled(False)
        self.args = args
        self.model, self.tokenizer = models.load(args.model, device=args.device)
        make = caches.decoded if args.decoded else caches.ours
        every = caches.candidates(head_dim(self.model), args.quick, args.backend, make)
        every += [caches.calibrated(self.model, file, args.backend, args.decoded) for file in args.calibrations]
        self.candidates = [c for c in every if c is EXACT or not args.only or any(only in c.name for only in args.only)]
        self.pieces: dict[str, list[torch.Tensor]] = {}

    def measure(self, item: Item) -> list[Row]:
        """One row for each cache that the item is measured for."""
        kind, *where = item
        rows: dict[str, Row] = getattr(self, f"_{kind}")(*where)
        about = {c.name: {"name": c.name, "kind": c.kind, "bits": c.effective_bits} for c in self.candidates}
        return [{"item": list(item), **about[name], **row} for name, row in rows.items()]

    def _text(self, name: str, *pieces: int) -> dict[str, Row]:
        return compare(self.model, torch.stack([self.piece(name, piece) for piece in pieces]), self.candidates)

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


def documents(tokenizer: Any, windows: int, length: int, names: Sequence[str]) -> dict[str, list[torch.Tensor]]:
    """`windows` pieces of `length` tokens of each text, evenly spread."""
    out = {}
    for name in names:
        text = texts.enough(name, 40_000 * windows)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        if len(ids) < windows * length:
            raise ValueError(f"[fidelity] expected {windows * length} tokens of {name}; got {len(ids)}")
        starts = [(2 * i + 1) * (len(ids) - length) // (2 * windows) for i in range(windows)]
        out[name] = [ids[start : start + length] for start in starts]
    return out


def same_length(prompts: dict[float, torch.Tensor], most: int) -> list[list[float]]:
    """The keys of prompts [1, tokens] in groups of one length, of at most so many."""
    groups: dict[int, list[float]] = {}
    for key, ids in prompts.items():
        groups.setdefault(ids.shape[1], []).append(key)
    return [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]


def predictions(model: Any, ids: torch.Tensor, candidate: Candidate, block: int = BLOCK) -> Iterator[torch.Tensor]:
    """Log-probabilities [batch, block, vocabulary] at the second half of documents [batch, tokens], block by block."""
    tokens, cache = ids.shape[1], candidate.make(model)
    for start, stop in spans(tokens, block):
        keep = min(stop - tokens // 2, stop - start)
        with attention(model, candidate.implementation):
            logits = step(model, ids[:, start:stop].to(model.device), cache, max(keep, 1))
        if keep > 0:
            yield logits.log_softmax(-1)


def loss_of(predicted: torch.Tensor, ids: torch.Tensor, at: int) -> float:
    """Sum over the tokens of documents [batch, tokens] that log-probabilities [batch, block, vocabulary], those at
    positions from `at` on, predict."""
    target = ids[:, at + 1 : at + 1 + predicted.shape[1], None].to(predicted.device)
    return -float(predicted[:, : target.shape[1]].gather(-1, target).double().sum())


def compare(
    model: Any,
    ids: torch.Tensor,
    candidates: Sequence[Candidate],
    block: int = BLOCK,
    reference: Sequence[torch.Tensor] | None = None,
) -> dict[str, Row]:
    """KL to the exact cache in nats, share of the same top token and loss, means over the second halves of documents
    [batch, tokens]; `reference`: the exact cache's predictions, if they are at hand."""
    if reference is None:
        reference = list(predictions(model, ids, EXACT, block))
    batch, tokens = ids.shape
    out = {}
    for candidate in candidates:
        kl = same = loss = 0.0
        at = tokens // 2
        for p, q in zip(reference, predictions(model, ids, candidate, block), strict=True):
            kl += float((p.exp() * (p - q)).sum(-1).double().sum())
            same += float((p.argmax(-1) == q.argmax(-1)).sum())
            loss += loss_of(q, ids, at)
            at += p.shape[1]
        count = batch * (tokens - tokens // 2)
        out[candidate.name] = {
            "kl": kl / count,
            "same_top": same / count,
            "loss": loss / (count - batch),
            "positions": count,
        }
    return out


def greedy(model: Any, ids: torch.Tensor, candidate: Candidate, count: int) -> torch.Tensor:
    """`count` tokens after each of the prompts [batch, tokens], or fewer, ended by end-of-sequence tokens, if all rows
    ended: [batch, count]."""
    stop = torch.tensor(model.generation_config.eos_token_id, device=ids.device).reshape(-1)
    cache, out = candidate.make(model), torch.empty(len(ids), 0, dtype=ids.dtype, device=ids.device)
    ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    with attention(model, candidate.implementation):
        for start, last in spans(ids.shape[1], 2 * BLOCK):
            logits = step(model, ids[:, start:last], cache, keep=1)
        while True:
            new = logits[:, -1].argmax(-1, keepdim=True)
            new = torch.where(ended, stop[0], new)
            out = torch.cat([out, new], 1)
            ended |= torch.isin(new, stop)
            if out.shape[1] == count or bool(ended.all()):
                return torch.nn.functional.pad(out, (0, count - out.shape[1]), value=int(stop[0]))
            logits = step(model, new, cache, keep=1)


_bench: Bench


def _start(args: argparse.Namespace) -> None:
    global _bench
    _bench = Bench(args)


def _measure(item: Item) -> tuple[Item, list[Row], float]:
    start = time.time()
    return item, _bench.measure(item), time.time() - start


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all items that the journal does not hold, and sum up."""
    every = work(args)
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
        _start(args)
        for item in left:
            finish(*_measure(item))
    else:
        with torch.multiprocessing.get_context("spawn").Pool(args.workers, _start, (args,)) as pool:
            for result in pool.imap_unordered(_measure, left):
                finish(*result)
    result = summary(args, [row for item in every for row in done[item]])
    for row in result["rows"]:
        print(describe(row))
    for row in result["canaries"]:
        print(f"{row['canary']:32s} {row['name']:44s} KL {row['kl']:.5f}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true")
    size.add_argument("--full", action="store_true")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto", help="kernels of our caches (default auto)")
    parser.add_argument("--only", nargs="+", help="caches whose name holds one of these")
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), help="names or files (default %(default)s)")
    parser.add_argument("--windows", type=int, help="pieces of each text (default: 1 or 4)")
    parser.add_argument("--length", type=int, help="tokens of a piece (default: 1152 or 2048)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what is measured")
    parser.add_argument("--batch", type=int, default=1, help="documents or prompts of one length read at once")
    parser.add_argument("--calibrations", type=Path, nargs="+", default=[], metavar="FILE", help="also measure these")
    parser.add_argument("--decoded", action="store_true", help="read pages through decode_pages and stock attention")
    parser.add_argument("--workers", type=int, default=1, help="processes; set OMP_NUM_THREADS=1 with several")
    parser.add_argument("--journal", type=Path, help="where finished items are kept and looked for")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    args.windows = args.windows or (1 if args.quick else 4)
    args.length = args.length or (1152 if args.quick else 2048)
    start = time.time()
    result = run(args) | {"seconds": time.time() - start, "cpu_seconds": sum(os.times()[:4])}
    save(result, args.json, args.plot)


if __name__ == "__main__":
    main()
