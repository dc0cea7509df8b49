"""`forgeattn calibrate --sparse`: how a model's heads spread their attention, and token budgets from it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..codec import PAGE
from ..integrations.hf.cache import ForgeCache
from ..models.fingerprint import fingerprint
from ..sparse.budgets import Budgets, water_fill
from .evaluation.streaming import attention, spans, step

SHARES = (0.99, 0.995, 0.999)
QUERIES = 16
"""Newest queries that are looked at, at each context length of each text."""
NAME = "forge-measure"


@dataclass(frozen=True, eq=False)
class HeadStatistics:
    """How the heads of a layer attend at one context length; means over queries and texts.

    Attributes:
        tokens: fewest tokens that carry `SHARES` of the mass, [q_heads, 3].
        entropy: of the attention weights, nats, [q_heads].
        sinks, window: share of the mass on the tokens that a packed cache keeps exact, [q_heads].
        counts: numbers of packed tokens kept, [points].
        dropped: mass that is then dropped, [q_heads, points].
    """

    tokens: NDArray[np.float64]
    entropy: NDArray[np.float64]
    sinks: NDArray[np.float64]
    window: NDArray[np.float64]
    counts: NDArray[np.int64]
    dropped: NDArray[np.float64]


def grid(context: int, points: int = 96) -> NDArray[np.int64]:
    """Rising numbers of tokens from 0 to `context`, close together where they are small."""
    return np.unique(np.append(0, np.geomspace(1, context, points).round())).astype(np.int64)


def head_statistics(q: torch.Tensor, k: torch.Tensor, scale: float, sinks: int, window: int) -> HeadStatistics:
    """Statistics of the newest queries.

    Args:
        q: [q_heads, n, head_dim], those of the last n positions.
        k: [kv_heads, tokens, head_dim].
        scale: softmax scale.
        sinks, window: exact tokens of a packed cache; its window holds up to 63 more, here half of them.
    """
    heads, n, _ = q.shape
    tokens = k.shape[1]
    keys = k.repeat_interleave(heads // k.shape[0], 0).float()
    scores = scale * q.float() @ keys.transpose(1, 2)
    at = torch.arange(tokens, device=q.device)
    own = at[-n:, None]
    p = scores.masked_fill(at > own, -torch.inf).softmax(-1)
    recent = at > own - (window + PAGE // 2)
    first = (at < sinks) & ~recent
    packed = p.masked_fill(recent | first, 0).sort(-1, descending=True).values.double().cumsum(-1)
    counts = grid(tokens)
    whole = packed[..., -1:]
    points = torch.from_numpy(counts[1:] - 1).to(q.device)
    dropped = torch.cat([whole, whole - packed[..., points]], -1).clamp(min=0)
    every = p.sort(-1, descending=True).values.double().cumsum(-1)
    needed = torch.stack([(every < share).sum(-1) + 1 for share in SHARES], -1)
    logs = torch.where(p > 0, p, 1.0).log()

    def mean(x: torch.Tensor) -> NDArray[np.float64]:
        return x.double().mean(1).cpu().numpy()

    masses = mean((p * first).sum(-1)), mean((p * recent).sum(-1))
    return HeadStatistics(mean(needed), mean(-(p * logs).sum(-1)), *masses, counts, mean(dropped))


@contextmanager
def _recording(seen: Callable[[int, torch.Tensor, torch.Tensor, float], None]) -> Iterator[None]:
    """Makes the attention implementation `NAME` call seen(layer, q, k, scale) and attend as "sdpa"."""

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        scaling = kwargs.get("scaling")
        seen(module.layer_idx, q, k, q.shape[-1] ** -0.5 if scaling is None else float(scaling))
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    yield


@torch.no_grad()
def measure(
    model: Any,
    ids: torch.Tensor,
    contexts: Sequence[int],
    on_text: Callable[[], None] | None = None,
) -> dict[int, list[HeadStatistics]]:
    """Statistics of every packed layer at every context length.

    Args:
        model: a transformers causal language model.
        ids: int64 [texts, tokens].
        contexts: rising lengths, at most the tokens.
        on_text: called after each text.

    Raises:
        ValueError: lengths that do not fit.
    """
    spec = ForgeCache(model.config).spec
    layers = ForgeCache(model.config).packed
    least = spec.sinks + spec.window + PAGE
    if not contexts or min(contexts) < least or max(contexts) > ids.shape[1] or list(contexts) != sorted(set(contexts)):
        raise ValueError(f"[measure] expected rising contexts from {least} to {ids.shape[1]}; got {list(contexts)}")
    found: dict[tuple[int, int], list[HeadStatistics]] = {}
    here: list[int] = []

    def seen(layer: int, q: torch.Tensor, k: torch.Tensor, scale: float) -> None:
        if here and layer in layers:
            made = head_statistics(q[0, :, -QUERIES:], k[0], scale, spec.sinks, spec.window)
            found.setdefault((layer, here[0]), []).append(made)

    with _recording(seen), attention(model, NAME):
        for text in ids.to(model.device):
            cache, start = DynamicCache(config=model.config), 0
            for context in contexts:
                pieces = [(start + a, start + b) for a, b in spans(context - start, 256)]
                for a, b in pieces:
                    here[:] = [context] if b == context else []
                    step(model, text[None, a:b], cache, keep=1)
                start = context
            if on_text is not None:
                on_text()
    out: dict[int, list[HeadStatistics]] = {layer: [] for layer in layers}
    for layer in layers:
        for context in contexts:
            runs = found[layer, context]
            means: dict[str, Any] = {f.name: np.mean([getattr(r, f.name) for r in runs], 0) for f in fields(runs[0])}
            out[layer].append(HeadStatistics(**{**means, "counts": runs[0].counts}))
    return out


def allot(statistics: dict[int, HeadStatistics], top_k: int, group: int) -> dict[int, NDArray[np.int32]]:
    """Budgets by layer, of the same total as `top_k` tokens of every head, by `water_fill`.

    Args:
        statistics: of every layer at one context length.
        top_k: mean budget of a head.
        group: neighbouring heads that get one budget, by the worst of their curves: those that share keys and values,
            whose pages are read for all of them; 1 for every head its own.
    """
    layers = sorted(statistics)
    curves = np.concatenate([statistics[i].dropped for i in layers])
    heads = len(statistics[layers[0]].dropped)
    shared = curves.reshape(-1, group, curves.shape[1]).max(1)
    budgets = water_fill(shared, statistics[layers[0]].counts, top_k * len(shared)).repeat(group)
    return {layer: budgets[i * heads : (i + 1) * heads] for i, layer in enumerate(layers)}


def heatmap(budgets: Budgets, statistics: dict[int, HeadStatistics]) -> Any:
    """A figure of two maps, layers by heads: tokens that carry 99.5 % of the mass, and budgets."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    layers = sorted(budgets.layers)
    needed = np.stack([statistics[i].tokens[:, 1] for i in layers])
    given = np.stack([budgets.layers[i] for i in layers])
    figure = Figure(figsize=(7, 6), layout="constrained")
    maps: Any = ((needed, "tokens for 99.5 % of the mass"), (given, f"budgets, mean {budgets.mean:.0f}"))
    for axis, (values, title) in zip(figure.subplots(1, 2), maps):
        image = axis.imshow(values.clip(1), aspect="auto", norm=LogNorm(), cmap="viridis")
        axis.set(title=title, xlabel="query head", ylabel="layer")
        axis.set_yticks(range(0, len(layers), 5), [str(layers[i]) for i in range(0, len(layers), 5)])
        figure.colorbar(image, ax=axis)
    return figure


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`forgeattn calibrate --sparse`."""
    from .. import models
    from ..util.environment import environment
    from ..util.progress import progress
    from .evaluation import kl, texts
    from .evaluation.streaming import first_tokens, tokenise

    model, tokenizer = models.load(args.model)
    names = (args.text,) if args.text else ("genesis", "licences", "code")
    pieces = []
    for name in names:
        ids = tokenise(tokenizer, texts.read(name))
        pieces.append(kl.windows(ids, args.tokens, args.windows, first_tokens(tokenizer)))
    ids = torch.cat(pieces)
    contexts = [args.tokens // 2**i for i in range(8) if args.tokens // 2**i >= 256][::-1]
    with progress("Reading", len(ids)) as advance:
        statistics = measure(model, ids, contexts, advance)
    longest = {layer: runs[-1] for layer, runs in statistics.items()}
    config = model.config.get_text_config(decoder=True)
    group = config.num_attention_heads // config.num_key_value_heads
    made = Budgets(fingerprint(model), allot(longest, args.top_k, 1 if args.every_head else group))
    made.save(args.out)
    if args.image:
        heatmap(made, longest).savefig(args.image, dpi=120)
    rows = []
    for i, context in enumerate(contexts):
        at = [statistics[layer][i] for layer in sorted(statistics)]
        tokens = np.stack([s.tokens for s in at])
        exact = np.stack([s.sinks + s.window for s in at])
        row = {
            "context": context,
            **{f"tokens_{share}": float(np.median(tokens[..., j])) for j, share in enumerate(SHARES)},
            **{f"worst_tokens_{share}": float(tokens[..., j].max()) for j, share in enumerate(SHARES)},
            "entropy": float(np.mean([s.entropy.mean() for s in at])),
            "sinks": float(np.mean([s.sinks.mean() for s in at])),
            "window": float(np.mean([s.window.mean() for s in at])),
            "least_exact": float(exact.min()),
        }
        rows.append(row)
        print(
            f"{context:>6} tokens: 99 / 99.5 / 99.9 % of the mass in "
            + ", ".join(
                " / ".join(f"{row[which + str(share)]:.0f}" for share in SHARES) + f" ({name} head)"
                for which, name in (("tokens_", "median"), ("worst_tokens_", "worst"))
            )
            + f"; sinks {row['sinks']:.2f}, window {row['window']:.2f}"
        )
    every = np.concatenate([made.layers[i] for i in sorted(made.layers)])
    counts = longest[min(longest)].counts
    curves = np.concatenate([longest[i].dropped for i in sorted(longest)])
    dropped = [float(np.interp(b, counts, c)) for b, c in zip(every, curves)]
    equal = [float(np.interp(args.top_k, counts, c)) for c in curves]
    print(
        f"budgets {every.min()} to {every.max()}, mean {made.mean:.1f}: the worst head drops {max(dropped):.4f} of "
        f"its mass, with {args.top_k} for each {max(equal):.4f}; {Path(args.out)}"
    )
    return {
        "model": args.model,
        "rows": rows,
        "budgets": {str(i): b.tolist() for i, b in made.layers.items()},
        "worst_dropped": max(dropped),
        "worst_dropped_equal": max(equal),
        "mean_dropped": float(np.mean(dropped)),
        "mean_dropped_equal": float(np.mean(equal)),
        "env": environment(),
    }
