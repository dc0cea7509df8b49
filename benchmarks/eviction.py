"""Eviction on a real model: KL, perplexity and needles at several retentions, from the exact and from the packed cache.

    python benchmarks/eviction.py sweep --device cuda --share 0 12 --json part0.json     one process of twelve
    python benchmarks/eviction.py time --device cuda --json time.json                    what rounds cost
    python benchmarks/eviction.py merge part*.json time.json --json eviction.json

Four texts of 2048 tokens, read in blocks of 128 (KL) and of 512 (perplexity), measured over their second halves; two
needles at five depths of 1500 and of 2500 tokens. "exact" rows give up tokens of an exact cache (eviction_exact.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from candidates import EXACT, Candidate
from eviction_exact import EvictedCache, Exact
from fidelity_measure import compare, loss_of, predictions
from transformers import DynamicCache

from forgeattention import models
from forgeattention.eviction import POLICIES, Centres, Eviction, rope_of
from forgeattention.eviction.triattention import join_heads
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.tools.evaluation import memory, niah, texts
from forgeattention.tools.evaluation.streaming import attention, first_tokens, opened, spans, step, tokenise
from forgeattention.util.environment import environment
from forgeattention.util.files import write_json

TEXTS = ("genesis", "licences", "code", "json")
NEEDLES = (niah.Needle(), niah.Needle("SILVER COMPASS", "3159"))
RETENTIONS = (0.9, 0.75, 0.5)
TOKENS = 2048
CONTEXT = 7168


def jobs() -> list[dict[str, Any]]:
    """What is measured, one dict a row."""
    out: list[dict[str, Any]] = [{"cache": "exact", "policy": None}, {"cache": "packed", "policy": None}]
    caches = ("exact", "packed")
    for kept, policy in itertools.product(RETENTIONS, ("v3", "random", "recency", "v1", "v2")):
        out += [{"cache": c, "policy": policy, "retention": kept} for c in caches]
        if policy == "v3":
            out += [{"cache": c, "on_evict": "host", "policy": policy, "retention": kept} for c in caches]
    for kept in RETENTIONS:
        base = {"policy": "v3", "retention": kept}
        out += [{"cache": "packed", "join": "mean", **base}]
        out += [{"cache": "exact", "join": j, **base} for j in ("mean", "mean-first", "top8")]
        out += [{"cache": "exact", "granularity": g, **base} for g in ("tokens", "entry")]
    base = {"policy": "v3", "retention": 0.5, "on_evict": "host"}
    for share, pages in ((0.02, 8), (0.1, 8), (0.2, 8), (0.05, 4), (0.05, 16), (0.05, 32)):
        out += [{"cache": c, "recall_share": share, "recall_pages": pages, **base} for c in caches]
    return out


def few() -> list[dict[str, Any]]:
    """What --quick measures, what is asked most first."""
    out: list[dict[str, Any]] = [{"cache": "packed", "policy": None}, {"cache": "exact", "policy": None}]
    v3 = {"cache": "packed", "policy": "v3"}
    for kept, where in ((0.5, "host"), (0.9, "drop"), (0.9, "host"), (0.5, "drop"), (0.75, "host"), (0.75, "drop")):
        out.append({**v3, "retention": kept, "on_evict": where})
    out += [{"cache": "packed", "policy": p, "retention": k} for k in (0.9, 0.5) for p in ("random", "recency")]
    out += [{"cache": "packed", "policy": p, "retention": 0.5} for p in ("v1", "v2")]
    out += [{"cache": "exact", "policy": "v3", "retention": k} for k in (0.9, 0.5)]
    out += [{"cache": "exact", "policy": "v3", "retention": k, "on_evict": "host"} for k in (0.9, 0.5)]
    return out


def maker(model: Any, job: dict[str, Any]) -> tuple[Any, str | None]:
    """What makes a job's caches, and the attention implementation that they need."""
    job = dict(job)
    cache, policy, kept = job.pop("cache"), job.pop("policy"), job.pop("retention", 1.0)
    if policy is None:
        return (lambda: ForgeCache(model), "forge") if cache == "packed" else (
            lambda: DynamicCache(config=model.config), None
        )  # fmt: skip
    made = POLICIES[policy](kept)
    if cache == "packed":
        return lambda: ForgeCache(model, eviction=Eviction(made, **job)), "forge"
    demote = job.pop("on_evict", "drop") != "drop"
    return lambda: EvictedCache(model, Exact(made, demote=demote, **job)), "evicted"


def counts(cache: Any) -> dict[str, Any] | None:
    if isinstance(cache, EvictedCache):
        return cache.counts()
    return cache.report()["eviction"] if getattr(cache, "eviction", None) is not None else None


class Bench:
    """A model, its texts, and what the exact cache predicts for them.

    `quick`: 1536 tokens of each text, in blocks of 128 only, and needles in 1500 tokens only."""

    def __init__(self, model: Any, tokenizer: Any, quick: bool) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.blocks, self.lengths = ((128,), (1500,)) if quick else ((128, 512), (1500, 2500))
        self.ids, self.reference, self.exact_loss = {}, {}, {}
        for name in TEXTS:
            text = texts.enough(name, 16 * TOKENS) if name in texts.GENERATED else texts.read(name)
            ids = tokenise(tokenizer, text)[None, : 1536 if quick else TOKENS]
            self.ids[name] = opened(ids, first_tokens(tokenizer))
        for name, block in itertools.product(TEXTS, self.blocks):
            ids, half = self.ids[name], self.ids[name].shape[1] // 2
            with torch.no_grad():
                known = list(predictions(model, ids, EXACT, block))
            self.reference[name, block] = known
            self.exact_loss[name, block] = loss_of(torch.cat(known, 1), ids, half) / (ids.shape[1] - half - 1)

    def measure(self, job: dict[str, Any]) -> dict[str, Any]:
        """One row: KL by text, perplexity, needles, and what eviction did."""
        make, implementation = maker(self.model, job)
        made: list[Any] = []

        def keep(_: Any = None) -> Any:
            made.append(make())
            return made[-1]

        row: dict[str, Any] = {**job, "kl": {}, "same_top": {}, "perplexity": {}, "exact_perplexity": {}, "counts": []}
        candidates = [Candidate("this", 0, keep, implementation, "")]
        for name, block in itertools.product(TEXTS, self.blocks):
            known = self.reference[name, block]
            with torch.no_grad():
                found = compare(self.model, self.ids[name], candidates, block, known)["this"]
            if block == self.blocks[0]:
                row["kl"][name], row["same_top"][name] = found["kl"], found["same_top"]
            if block == self.blocks[-1]:
                row["perplexity"][name] = math.exp(found["loss"])
                row["exact_perplexity"][name] = math.exp(self.exact_loss[name, block])
            row["counts"].append(counts(made.pop()))
        cells = []
        for needle, length in itertools.product(NEEDLES, self.lengths):
            for document in niah.documents("single", self.tokenizer, [length], needle=needle):
                cells += niah.ask(self.model, self.tokenizer, document, keep, implementation=implementation)
                row["counts"].append(counts(made.pop()))
        row["needles"] = [{"length": c.length, "depth": c.depth, "outcome": c.outcome.value} for c in cells]
        row["passed"] = sum(c.outcome is niah.Outcome.PASS for c in cells)
        if job["policy"] is not None and not all(c["rounds"] for c in row["counts"]):
            raise ValueError(f"[eviction] expected rounds in every run; got none: {job}")
        return row


def correlation(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Spearman's rank correlation, by layer, of scores at half of a text with attention received afterwards; of tokens
    and of pages, joined over heads alike, and of recency for comparison."""
    rope = rope_of(model.config)
    ids = opened(tokenise(tokenizer, texts.read("genesis"))[None, :1536], first_tokens(tokenizer))
    half, past = 1024, EvictedCache(model, Exact(POLICIES["v3"](1.0)))
    with torch.no_grad(), attention(model, "evicted"):
        for first, last in spans(half, 128):
            step(model, ids[:, first:last].to(model.device), past, keep=1)
    with torch.no_grad(), attention(model, "eager"):
        seen = model(ids.to(model.device), output_attentions=True, use_cache=False).attentions
    rows = []
    for number, (layer, weights) in enumerate(zip(past.layers, seen)):
        got = weights[0, :, half:, 4:half].sum(1).double().cpu().numpy()
        keys = layer.keys[0].float().cpu().numpy()[:, 4:half]
        centres: Centres = layer.centres
        group = len(got) // len(keys)
        scores = np.stack([keys[h // group] @ q for h, q in enumerate(centres.folded(half, keys.shape[2]))])
        norms = np.stack([np.abs(rope.pairs(keys[h // group])) @ w for h, w in enumerate(centres.norm_weights())])
        wanted, told = join_heads(np.log(got + 1e-9)), join_heads(scores + norms)
        pages = [x[: len(x) // 64 * 64].reshape(-1, 64).max(1) for x in (wanted, told)]
        rows.append({
            "layer": number, "tokens": spearman(wanted, told), "pages": spearman(*pages),
            "heads": float(np.mean([spearman(a, b) for a, b in zip(got, scores + norms)])),
            "trigonometric_alone": float(np.mean([spearman(a, b) for a, b in zip(got, scores)])),
            "recency": spearman(wanted, np.arange(len(wanted))),
        })  # fmt: skip
    return rows


def spearman(a: Any, b: Any) -> float:
    ranks = [np.argsort(np.argsort(x)).astype(np.float64) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def timing(model: Any, tokenizer: Any, context: int, new: int, repeats: int) -> list[dict[str, Any]]:
    """Prefill and decode of one long text with and without eviction: medians, and bytes of the cache."""
    ids = tokenizer(texts.read("licences"), add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = ids[:, : context + new].to(model.device)
    rows = []
    for evict in (None, "random:0.5", "v3:0.9", "v3:0.5", "v3:0.5:host", "v3:0.5:disk"):
        took = []
        for _ in range(repeats):
            cache = ForgeCache(model, eviction=None if evict is None else Eviction.parse(evict))
            with torch.no_grad(), attention(model, "forge"):
                parts = []
                for first, last, block in ((0, context, 512), (context, context + new, 1)):
                    _wait(model)
                    start = time.perf_counter()
                    for a, b in spans(last - first, block):
                        step(model, ids[:, first + a : first + b], cache, keep=1)
                    _wait(model)
                    parts.append((time.perf_counter() - start) / (last - first))
            took.append(parts)
        prefill, decode = np.median(took, 0)
        held = memory.cache_bytes(cache)
        rows.append({
            "evict": evict, "tokens": context + new, "prefill_us_per_token": 1e6 * prefill,
            "decode_us_per_token": 1e6 * decode, "bytes": held, "bytes_per_token": held / (context + new),
            "counts": counts(cache),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """KL and needles against retention, one line a policy, of the packed cache; of the exact one dotted."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        kl, found = float(np.mean(list(row["kl"].values()))), row["passed"] / len(row["needles"])
        if row["policy"] is None:
            for axis, level in zip(axes, (kl, found)):
                if row["cache"] == "packed":
                    axis.axhline(level, color="#8a8f98", linestyle="--", linewidth=1, label="packed, all kept")
            continue
        if {"join", "granularity", "recall_share", "recall_pages"} & set(row):
            continue
        name = f"{row['policy']}{', demoted' if row.get('on_evict', 'drop') != 'drop' else ''}"
        lines.setdefault(f"{name}{'' if row['cache'] == 'packed' else ', exact cache'}", []).append(
            (row["retention"], kl, found)
        )
    for name, points in lines.items():
        kept, kls, found = zip(*sorted(points))
        for axis, values in zip(axes, (kls, found)):
            axis.plot(kept, values, "o:" if "exact" in name else "o-", label=name, markersize=4)
    axes[0].set(yscale="log", xlabel="tokens kept", ylabel="KL to the exact cache, nats")
    axes[1].set(xlabel="tokens kept", ylabel="needles found", ylim=(-0.03, 1.03))
    axes[1].legend(fontsize=7)
    for axis in axes:
        axis.grid(True, alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sweep", "time", "correlation", "merge"))
    parser.add_argument("files", nargs="*", type=Path, help="of merge")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    parser.add_argument("--context", type=int, default=CONTEXT, help="of time: tokens of the prompt")
    parser.add_argument("--new", type=int, default=256, help="of time: tokens decoded")
    parser.add_argument("--repeats", type=int, default=3, help="of time")
    parser.add_argument("--quick", action="store_true", help="sweep: fewer, smaller rows, for lack of a GPU")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="of merge")
    args = parser.parse_args()
    if args.what == "merge":
        merged: dict[str, Any] = {"rows": [], "time": [], "correlation": []}
        for path in args.files:
            found = json.loads(path.read_text())
            merged["env"] = found["env"]
            for name in ("rows", "time", "correlation"):
                merged[name] += found.get(name, [])
        write_json(args.json, merged)
        if args.plot:
            plot(merged["rows"], args.plot)
        return
    model, tokenizer = models.load(args.model, device=args.device)
    out: dict[str, Any] = {"env": {**environment(), "device": args.device}}
    if args.device == "cuda":
        out["env"]["device"] = torch.cuda.get_device_name()
    if args.what == "time":
        out["time"] = timing(model, tokenizer, args.context, args.new, args.repeats)
    elif args.what == "correlation":
        out["correlation"] = correlation(model, tokenizer)
    else:
        out["rows"] = []
        bench = Bench(model, tokenizer, args.quick)
        for job in (few() if args.quick else jobs())[args.share[0] :: args.share[1]]:
            out["rows"].append(bench.measure(job))
            row = out["rows"][-1]
            print(json.dumps(job), round(float(np.mean(list(row["kl"].values()))), 4), row["passed"], flush=True)
            write_json(args.json, out)
    write_json(args.json, out)


if __name__ == "__main__":
    main()
