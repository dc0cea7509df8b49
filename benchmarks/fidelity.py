"""Fidelity of caches on a real model: KL, same top token, needles, generation agreement, and canaries.

    python benchmarks/fidelity.py --quick            under 10 minutes on two cores: presets and two peers, one window
    python benchmarks/fidelity.py --full             every cache, every measure

Caches of this package are the real ones (integrations/hf.py); others are simulated (peer_caches.py). Texts are read in
blocks of 128 tokens (KL) or 256 (needles), as in chunked prefill. A canary is the same model with keys that break
lesser caches: a large bias on slow RoPE channels, or a few channels scaled up and their queries down. --share I N runs
every N-th cache from the I-th, for several processes on one GPU; --merge joins their files.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import peer_caches
import torch
from transformers import DynamicCache

from forgeattention import CodecSpec, models
from forgeattention.calibrate import codecs_for, coded_cache
from forgeattention.codec import Codec
from forgeattention.codec.presets import PRESETS
from forgeattention.evaluation import niah, report, texts
from forgeattention.evaluation.streaming import attention, spans, step
from forgeattention.integrations.hf import ForgeCache

NEEDLES = (niah.Needle(), niah.Needle("SILVER COMPASS", "3159"), niah.Needle("CRIMSON LANTERN", "8604"))
TEXTS = ("genesis", "licences", "code", "json")
BLOCK = 128
PROMPTS = 20
CANARIES = {"key bias 150": ("bias", 150.0), "key bias 900": ("bias", 900.0), "channels x 30": ("scale", 30.0)}


@dataclass(frozen=True)
class Candidate:
    """A cache to measure."""

    name: str
    effective_bits: float
    make: Callable[[Any], Any]
    implementation: str | None


def ours(name: str, spec: CodecSpec, head_dim: int, fitted: bool = True) -> Candidate:
    """A packed cache; with `fitted` its codecs are read off the model's weights."""
    bits = spec.page_format(head_dim).effective_bits
    return Candidate(name, bits, lambda model: ForgeCache(model if fitted else model.config, spec), "forge")


def decoded(name: str, spec: CodecSpec, head_dim: int, fitted: bool = True) -> Candidate:
    """The same pages, coded by the native kernels and read through decode_pages and stock attention, on any device."""

    def make(model: Any) -> Any:
        layers = range(model.config.num_hidden_layers)
        codecs = codecs_for(model, spec, layers) if fitted else dict.fromkeys(layers, plain(model))
        return coded_cache(model, {i: (codecs[i], "kv") for i in layers}, backend="cpu")

    @lru_cache
    def plain(model: Any) -> Codec:
        return codecs_for(model, spec, [0], fitted=False)[0]

    return Candidate(name, spec.page_format(head_dim).effective_bits, make, None)


def candidates(head_dim: int, quick: bool, ours: Callable[..., Candidate] = ours) -> list[Candidate]:
    """Presets first, then what each choice of the default is worth, then the field."""
    norm: dict[str, Any] = {"k_scale_rule": "norm", "v_scale_rule": "norm"}
    base: dict[str, Any] = {
        "key_mean": False,
        "scales": "fp16",
        "k_code": "scalar",
        "v_code": "scalar",
        "refine": False,
    }
    out = [ours(f"preset {name}", spec, head_dim) for name, spec in PRESETS.items()]
    out += [
        ours("balanced, V trellis8", CodecSpec(v_code="trellis8"), head_dim),
        ours("balanced, not fitted to the model", CodecSpec(), head_dim, False),
        ours("scalar 3 bits, page mean, plain encoder", CodecSpec(k_code="scalar", refine=False), head_dim, False),
        ours("TurboQuant-style: Hadamard, 3 bits", CodecSpec(**norm, **base), head_dim, False),
        ours("origin: planar 45 degrees, 3 bits", CodecSpec(rotation="planar", **norm, **base), head_dim, False),
    ]
    if not quick:
        four = {**norm, **base, "k_bits": 4, "v_bits": 4}
        out += [
            ours("balanced, plain encoder", CodecSpec(refine=False), head_dim),
            ours("balanced, not fitted, plain encoder", CodecSpec(refine=False), head_dim, False),
            ours("balanced, K trellis4", CodecSpec(k_code="trellis4"), head_dim),
            ours("balanced, other signs", CodecSpec(seed=2), head_dim),
            ours("scalar 3 bits, page mean", CodecSpec(k_code="scalar"), head_dim),
            ours("K 4 bits, V 3 bits scalar", CodecSpec(k_bits=4), head_dim),
            ours("K 3 bits, V 2 bits trellis8", CodecSpec(v_bits=2, v_code="trellis8"), head_dim),
            ours("K 2 bits, V 3 bits", CodecSpec(k_bits=2), head_dim),
            ours("K 4 bits, V 2 bits trellis8", CodecSpec(k_bits=4, v_bits=2, v_code="trellis8"), head_dim),
            ours("scalar 2 bits", CodecSpec(k_bits=2, v_bits=2, k_code="scalar"), head_dim),
            ours("scalar 4 bits", CodecSpec(k_bits=4, v_bits=4), head_dim),
            ours("TurboQuant-style: Hadamard, 4 bits", CodecSpec(**four), head_dim, False),
            ours("origin: planar 45 degrees, 4 bits", CodecSpec(rotation="planar", **four), head_dim, False),
        ]
    few = ("KIVI 3-bit, groups of 32", "affine 4-bit, groups of 64 (mlx-lm)")
    for peer in peer_caches.PEERS:
        if not quick or peer.name in few:
            out.append(Candidate(peer.name, peer.effective_bits, _peer(peer), None))
    return out


def _peer(peer: peer_caches.Peer) -> Callable[[Any], Any]:
    spec = CodecSpec()
    return lambda model: peer_caches.make_cache(model.config, peer, spec.sinks, spec.window)


@contextmanager
def canary(model: Any, kind: str, strength: float) -> Iterator[Any]:
    """A copy of a Llama-like model with other keys.

    "bias" adds `strength` to the keys of the two slowest pairs of RoPE in the first, middle and last layer, as the key
    biases of Qwen2.5 do. "scale" multiplies two pairs of channels by `strength` and divides their queries by it, which
    changes nothing in exact arithmetic.
    """
    made = copy.deepcopy(model)
    layers = made.model.layers
    half = layers[0].self_attn.head_dim // 2
    pairs = [half - 1, half - 2, 2 * half - 1, 2 * half - 2] if kind == "bias" else [5, 20, 5 + half, 20 + half]
    for i, layer in enumerate(layers):
        q, k = layer.self_attn.q_proj, layer.self_attn.k_proj
        if kind == "bias" and i in (0, len(layers) // 2, len(layers) - 1):
            bias = torch.zeros(k.out_features // (2 * half), 2 * half, device=k.weight.device, dtype=k.weight.dtype)
            bias[:, pairs] = strength
            k.bias = torch.nn.Parameter(bias.reshape(-1), requires_grad=False)
        elif kind == "scale":
            for linear, factor in ((q, 1 / strength), (k, strength)):
                linear.weight.data.view(-1, 2 * half, linear.in_features)[:, pairs] *= factor
    yield made


def documents(tokenizer: Any, windows: int, length: int, names: list[str]) -> dict[str, list[torch.Tensor]]:
    """`windows` pieces of `length` tokens of each text, evenly spread."""
    out = {}
    for name in names:
        ids = tokenizer(texts.enough(name, 40_000 * windows), add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ][0]
        if len(ids) < windows * length:
            raise ValueError(f"[fidelity] expected {windows * length} tokens of {name}; got {len(ids)}")
        starts = [(2 * i + 1) * (len(ids) - length) // (2 * windows) for i in range(windows)]
        out[name] = [ids[start : start + length] for start in starts]
    return out


@torch.no_grad()
def predictions(model: Any, ids: torch.Tensor, cache: Any, implementation: str | None) -> Iterator[torch.Tensor]:
    """Log-probabilities at the second half of a document, block by block."""
    half = len(ids) // 2
    for start, stop in spans(len(ids), BLOCK):
        with attention(model, implementation):
            logits = step(model, ids[None, start:stop].to(model.device), cache, max(1, min(stop - half, BLOCK)))
        if stop > half:
            yield logits[0].log_softmax(-1)


class Reference:
    """The exact cache's predictions over documents, kept."""

    def __init__(self, model: Any, pieces: dict[str, list[torch.Tensor]]) -> None:
        self.model, self.pieces = model, pieces
        self.exact = {
            name: [list(predictions(model, ids, DynamicCache(config=model.config), None)) for ids in many]
            for name, many in pieces.items()
        }

    def measure(self, candidate: Candidate) -> dict[str, Any]:
        """KL and share of the same top token, by text and as means over texts."""
        rows = {}
        for name, many in self.pieces.items():
            kl = same = positions = 0.0
            for ids, exact in zip(many, self.exact[name], strict=True):
                cache = candidate.make(self.model)
                for p, q in zip(exact, predictions(self.model, ids, cache, candidate.implementation), strict=True):
                    kl += float((p.exp() * (p - q)).sum(-1).double().sum())
                    same += float((p.argmax(-1) == q.argmax(-1)).sum())
                    positions += len(p)
            rows[name] = {"kl": kl / positions, "same_top": same / positions, "positions": int(positions)}
        means = {key: sum(row[key] for row in rows.values()) / len(rows) for key in ("kl", "same_top")}
        return {**means, "positions": sum(row["positions"] for row in rows.values()), "texts": rows}


def measure_needles(
    model: Any, tokenizer: Any, candidate: Candidate, lengths: list[int], needles: int
) -> dict[str, str]:
    """Outcome of every cell, keyed "length depth answer"."""
    out: dict[str, str] = {}
    for needle in NEEDLES[:needles]:
        cells = niah.run(
            model,
            tokenizer,
            lambda: candidate.make(model),
            lengths=lengths,
            needle=needle,
            implementation=candidate.implementation,
        )
        out |= {f"{c.length} {c.depth} {needle.answer}": c.outcome.value for c in cells}
    return out


@torch.no_grad()
def greedy(model: Any, ids: torch.Tensor, cache: Any, implementation: str | None, new: int) -> list[int]:
    with attention(model, implementation):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
        )
    return out[0, ids.shape[1] :].tolist()


def measure_agreement(
    model: Any, candidate: Candidate, exact: list[list[int]], prompts: list[torch.Tensor]
) -> dict[str, Any]:
    """First diverging token of greedy text against the exact cache's, over the prompts."""
    first = []
    for ids, wanted in zip(prompts, exact, strict=True):
        got = greedy(model, ids, candidate.make(model), candidate.implementation, len(wanted))
        first.append(next((i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b), len(wanted)))
    return {"first_divergence": first, "mean_first_divergence": sum(first) / len(first), "of": len(exact[0])}


def agreement_prompts(pieces: dict[str, list[torch.Tensor]], device: Any) -> list[torch.Tensor]:
    """Openings of 600 tokens at fixed places of the documents."""
    each = PROMPTS // len(pieces)
    return [
        many[i % len(many)][i * 250 : i * 250 + 600][None].to(device) for many in pieces.values() for i in range(each)
    ]


def run(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_grad_enabled(False)
    model, tokenizer = models.load(args.model, device=args.device)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exact = Candidate("exact", 16.0, lambda model: DynamicCache(config=model.config), None)
    chosen = [
        c
        for c in candidates(head_dim, args.quick, decoded if args.decoded else ours)
        if not args.only or any(o in c.name for o in args.only)
    ]
    chosen = chosen[args.share[0] :: args.share[1]]
    pieces = documents(
        tokenizer, args.windows or (1 if args.quick else 4), args.length or (1152 if args.quick else 2048), args.texts
    )
    reference = Reference(model, pieces)
    lengths = [] if args.no_needles else [1000] if args.quick else [500, 1000, 1500, 2000, 2500]
    needles = 1 if args.quick else len(NEEDLES)
    expected = measure_needles(model, tokenizer, exact, lengths, needles)
    prompts = [] if args.quick else agreement_prompts(pieces, model.device)
    wanted = [greedy(model, p, exact.make(model), None, 64) for p in prompts]
    rows = []
    for candidate in chosen:
        start = time.time()
        row = {"name": candidate.name, "effective_bits": candidate.effective_bits, **reference.measure(candidate)}
        line = f"{candidate.name:44s} {row['effective_bits']:.4f} bits  KL {row['kl']:.5f}  top {row['same_top']:.1%}"
        if lengths and (not args.quick or candidate.name.startswith("preset")):
            found = measure_needles(model, tokenizer, candidate, lengths, needles)
            row["needles"] = {
                "of": len(found),
                "exact_pass": sum(v == "PASS" for v in expected.values()),
                "pass": sum(v == "PASS" for v in found.values()),
                "kept": sum(found[k] == v == "PASS" for k, v in expected.items()),
                "cells": found,
            }
            line += f"  needles {row['needles']['pass']}/{len(found)} (exact {row['needles']['exact_pass']})"
        if prompts:
            row |= measure_agreement(model, candidate, wanted, prompts)
        rows.append(row)
        print(f"{line}  {time.time() - start:.0f} s", flush=True)
    canaries = [] if args.quick or args.no_canaries else measure_canaries(model, pieces, chosen)
    return {
        "model": args.model,
        "device": args.device,
        "exact_needles": expected,
        "rows": sorted(rows, key=lambda row: row["effective_bits"]),
        "canaries": canaries,
        "env": report.environment(),
    }


def measure_canaries(
    model: Any, pieces: dict[str, list[torch.Tensor]], chosen: list[Candidate]
) -> list[dict[str, Any]]:
    """KL of some caches on models whose keys were made harder, each against that model's own exact cache."""
    names = ("preset", "balanced, not fitted", "scalar 3 bits", "TurboQuant", "affine 4-bit", "KIVI 3-bit")
    few = [candidate for candidate in chosen if candidate.name.startswith(names)]
    rows = []
    for name, (kind, strength) in CANARIES.items() if few else ():
        with canary(model, kind, strength) as other:
            reference = Reference(other, {key: many[:1] for key, many in pieces.items()})
            for candidate in few:
                row = reference.measure(candidate)
                rows.append({"canary": name, "name": candidate.name, **row})
                print(f"{name}: {candidate.name:44s} KL {row['kl']:.5f}", flush=True)
    return rows


def plot(result: dict[str, Any], path: Path) -> None:
    """KL against effective bits, logarithmic, ours and the field's."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for row in result["rows"]:
        own = row["name"].startswith("preset")
        axis.scatter(
            row["effective_bits"],
            row["kl"],
            color="#d9480f" if own else "#8a8f98",
            s=60 if own else 25,
            zorder=3 if own else 2,
        )
        axis.annotate(
            row["name"].removeprefix("preset "),
            (row["effective_bits"], row["kl"]),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=7,
        )
    axis.set(
        yscale="log",
        xlabel="effective bits per element",
        ylabel="KL to the exact cache (nats)",
        title=f"{result['model']}: fidelity against size",
    )
    axis.grid(True, which="both", alpha=0.3)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true")
    size.add_argument("--full", action="store_true")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", help="caches whose name holds one of these")
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), help="names or files (default %(default)s)")
    parser.add_argument("--windows", type=int, help="pieces of each text (default: 1 or 4)")
    parser.add_argument("--length", type=int, help="tokens of a piece (default: 1152 or 2048)")
    parser.add_argument("--no-needles", action="store_true")
    parser.add_argument("--no-canaries", action="store_true")
    parser.add_argument("--decoded", action="store_true", help="read pages through decode_pages and stock attention")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="join files; nothing is measured")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    result = merge(args.merge) if args.merge else run(args)
    if args.json:
        report.write_json(args.json, result)
    if args.plot:
        plot(result, args.plot)


def merge(files: list[Path]) -> dict[str, Any]:
    results = [json.loads(file.read_text()) for file in files]
    rows = [row for result in results for row in result["rows"]]
    canaries = [row for result in results for row in result["canaries"]]
    return {**results[0], "rows": sorted(rows, key=lambda row: row["effective_bits"]), "canaries": canaries}


if __name__ == "__main__":
    main()
