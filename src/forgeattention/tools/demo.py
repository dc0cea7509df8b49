"""`forgeattn demo`: a real model answers from the exact and from the packed cache, side by side."""

from __future__ import annotations

import argparse
import base64
import html
import io
import time
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

import torch

from .. import models
from ..models.shape import head_dim
from ..util.environment import environment
from ..util.files import write_json
from ..util.progress import progress
from .evaluation import kl, memory, niah, texts
from .evaluation.setup import caches, spec_from
from .evaluation.streaming import attention, first_tokens, opened, step, tokenise

KL_TOKENS = 2048
SPEED_STEPS = 32


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Ask the strict needle question at five depths of both caches, compare predictions, bytes and speed; print it and
    write report.json, report.png and report.html to the folder `args.output`."""
    spec = spec_from(args)
    model, tokenizer = models.load(args.model)
    make_exact, make_packed = caches(model, spec)
    makers = {"exact": make_exact, "packed": make_packed}
    with progress("Reading", 2 * len(niah.DEPTHS) + 3) as advance:
        asked = {name: _ask(model, tokenizer, make, name, args.length, advance) for name, make in makers.items()}
        speed, held, tokens = _measure(model, tokenizer, makers, args.length)
        advance()
        ids = tokenise(tokenizer, texts.read("genesis"))
        pieces = kl.windows(ids, KL_TOKENS, 2, first_tokens(tokenizer))
        fidelity = kl.compare(model, pieces, make_packed, implementation="forge", on_window=advance)
    result = {
        "model": args.model,
        "length": args.length,
        "needles": {
            "of": len(niah.DEPTHS),
            **{n: {"pass": sum(c.outcome is niah.Outcome.PASS for c in cells)} for n, cells in asked.items()},
            "cells": [
                {
                    "depth": e.depth,
                    "exact": e.outcome,
                    "packed": p.outcome,
                    "exact_text": e.reply.text,
                    "packed_text": p.reply.text,
                }
                for e, p in zip(asked["exact"], asked["packed"], strict=True)
            ],
        },
        "kl": fidelity.kl,
        "same_top": fidelity.same_top,
        "positions": fidelity.positions,
        "perplexity": {"exact": fidelity.exact_perplexity, "packed": fidelity.perplexity},
        "effective_bits": spec.page_format(head_dim(model)).effective_bits,
        "bytes": held,
        "cached_tokens": tokens,
        "tokens_per_s": speed,
        "spec": spec.to_json(),
        **environment(),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / "report.json", result)
    png = _plot(result)
    (args.output / "report.png").write_bytes(png)
    (args.output / "report.html").write_text(_page(result, png))
    print(_table(result))
    print(f"Reports: {args.output / 'report.json'}, report.png, report.html")
    return result


def _ask(
    model: Any, tokenizer: Any, make: Callable[[], Any], name: str, length: int, advance: Callable[[], None]
) -> list[niah.Cell]:
    implementation = "forge" if name == "packed" else None
    return niah.run(
        model, tokenizer, make, lengths=(length,), implementation=implementation, on_cell=lambda _: advance()
    )


@torch.no_grad()
def _measure(
    model: Any, tokenizer: Any, makers: dict[str, Callable[[], Any]], length: int
) -> tuple[dict[str, float], dict[str, int], int]:
    """Decode speed (median step of alternating runs), measured bytes of both caches, and tokens in them."""
    ids = opened(tokenise(tokenizer, niah.haystack(tokenizer, length))[None], first_tokens(tokenizer))
    held: dict[str, int] = {}
    made: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for name, make in makers.items():
        with attention(model, "forge" if name == "packed" else None):
            made[name] = make()
            step(model, ids, made[name], keep=1)
    for i in range(SPEED_STEPS):
        for name, cache in made.items():
            with attention(model, "forge" if name == "packed" else None):
                start = time.perf_counter()
                step(model, ids[:, i : i + 1], cache, keep=1)
                seconds[name].append(time.perf_counter() - start)
    for name, cache in made.items():
        held[name] = memory.cache_bytes(cache)
    speed = {name: 1 / sorted(s)[len(s) // 2] for name, s in seconds.items()}
    return speed, held, int(made["exact"].get_seq_length())


def _rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    needles, held, speed, ppl = (result[k] for k in ("needles", "bytes", "tokens_per_s", "perplexity"))
    smaller = held["exact"] / held["packed"]
    return [
        *(
            (f"needle at {c['depth']:.0%}: {c['exact']} / {c['packed']}", c["exact_text"], c["packed_text"])
            for c in needles["cells"]
        ),
        (
            "needles found",
            f"{needles['exact']['pass']} of {needles['of']}",
            f"{needles['packed']['pass']} of {needles['of']}",
        ),
        ("cache bytes, measured", f"{held['exact']:,}", f"{held['packed']:,} ({smaller:.2f}x less)"),
        ("bits per element", "32", f"{result['effective_bits']:.3f} in pages"),
        ("decode tokens/s", f"{speed['exact']:.1f}", f"{speed['packed']:.1f}"),
        ("perplexity", f"{ppl['exact']:.3f}", f"{ppl['packed']:.3f}"),
        ("KL to exact, nats", "0", f"{result['kl']:.4f}"),
        ("same top token", "100 %", f"{result['same_top']:.1%}"),
    ]


def _table(result: dict[str, Any]) -> str:
    head = (f"{result['model']}, {result['length']} tokens read", "exact cache", "packed cache")
    rows = [[" ".join(cell.split()) for cell in row] for row in (head, *_rows(result))]
    width = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{a:<{width[0]}}  {b:<{width[1]}}  {c}" for a, b, c in rows)


def _plot(result: dict[str, Any]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(9, 3), layout="constrained")
    colours = {"exact": "#8a8f98", "packed": "#d9480f"}
    values = (
        ("needles found", {n: result["needles"][n]["pass"] for n in colours}, "{:.0f}"),
        ("cache, MB", {n: result["bytes"][n] / 1e6 for n in colours}, "{:.1f}"),
        ("decode tokens/s", result["tokens_per_s"], "{:.1f}"),
    )
    for axis, (title, pair, form) in zip(axes, values, strict=True):
        bars = axis.bar(list(colours), [pair[n] for n in colours], color=list(colours.values()), width=0.6)
        axis.bar_label(bars, labels=[form.format(pair[n]) for n in colours], padding=2)
        axis.set_title(title)
        axis.margins(y=0.15)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.set_yticks([])
    figure.suptitle(f"{result['model']}: {result['effective_bits']:.2f} bits per element, KL {result['kl']:.4f}")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    pyplot.close(figure)
    return out.getvalue()


def _page(result: dict[str, Any], png: bytes) -> str:
    def row(name: str, *cells: str) -> str:
        text = "".join(f"<td>{html.escape(' '.join(cell.split()))}</td>" for cell in cells)
        return f"<tr><th>{html.escape(name)}</th>{text}</tr>"

    template = Template((Path(__file__).parent / "templates" / "demo.html").read_text())
    return template.substitute(
        {key: html.escape(str(result[key])) for key in ("model", "length", "processor", "cores", "positions")},
        bits=f"{result['effective_bits']:.2f}",
        png=base64.b64encode(png).decode(),
        rows="\n".join(row(*cells) for cells in _rows(result)),
        versions=html.escape(", ".join(f"{name} {version}" for name, version in result["versions"].items())),
    )
