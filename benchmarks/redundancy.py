"""Does it help to keep tokens of unlike values? Attention's error when K tokens are kept by relevance alone, or by
relevance against likeness (maximal marginal relevance, Carbonell and Goldstein, SIGIR 1998).

    python benchmarks/redundancy.py --json FILE

SmolLM2 reads a text; for queries of the text's end, every layer and head, K of the packed tokens are kept beside the
first and newest ones, which are exact. Likeness is the cosine of two tokens' values as their codes decode. The error is
|o - o_dense| / |o_dense|, mean over queries, layers and heads. "relevance, likeness w" keeps greedily, of the 2 K most
relevant tokens, the one whose rank (1 for the best, 0 for the last) less w times its likeness to any kept token is
largest; "no doubles c" passes over tokens whose likeness to a kept one is above c.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_states import watched

from forgeattention import models, ops
from forgeattention.codec import PAGE, Codec, CodecSpec
from forgeattention.ops import PageTable
from forgeattention.tools.evaluation import texts
from forgeattention.util.environment import environment
from forgeattention.util.files import write_json

SINKS, WINDOW = 4, 128
WEIGHTS = (0.1, 0.3, 1.0)
CEILINGS = (0.95, 0.8)


@torch.no_grad()
def states(model: Any, ids: torch.Tensor, queries: int) -> list[Any]:
    """Of each layer: queries [q_heads, queries, head_dim] of the last positions, keys and values of all."""
    found: list[Any] = []

    def record(_: int, q: Any, k: Any, v: Any) -> None:
        found.append([x[0].float().numpy() for x in (q[:, :, -queries:], k, v)])

    with watched(model, record):
        model(ids[None], logits_to_keep=1, use_cache=False)
    return found


def decoded(k: Any, v: Any) -> Any:
    """Values as their codes decode, [kv_heads, packed tokens, head_dim]."""
    codec = Codec(CodecSpec(refine=False), k.shape[2], len(k))
    pages = k.shape[1] // PAGE
    pool, at = np.zeros(pages * codec.page_bytes, np.uint8), np.arange(pages) * codec.page_bytes
    k, v = (np.ascontiguousarray(x[:, : pages * PAGE], np.float32) for x in (k, v))
    ops.encode(k, v, codec, pool, at)
    table = PageTable(pool, at[None], np.array([pages * PAGE], np.int32), pages * PAGE)
    return ops.decode_pages(codec, table)[1][0]


def rules(order: Any, unit: Any, k: int) -> dict[str, Any]:
    """Kept tokens by each rule; `order` by falling relevance, `unit` their normalised values."""
    pool = order[: 2 * k]
    like = unit[pool] @ unit[pool].T
    rank = 1 - np.arange(len(pool)) / len(pool)
    out = {"relevance": order[:k]}
    for weight in WEIGHTS:
        kept, nearest = [0], like[0].copy()
        gain = rank.copy()
        gain[0] = -np.inf
        while len(kept) < min(k, len(pool)):
            best = int(np.argmax(gain - weight * nearest))
            kept.append(best)
            gain[best] = -np.inf
            nearest = np.maximum(nearest, like[best])
        out[f"relevance, likeness {weight}"] = pool[kept]
    for ceiling in CEILINGS:
        kept, nearest = [], np.full(len(pool), -1.0)
        for i in range(len(pool)):
            if nearest[i] <= ceiling and len(kept) < k:
                kept.append(i)
                nearest = np.maximum(nearest, like[i])
        spare = np.setdiff1d(np.arange(len(pool)), kept)[: k - len(kept)]
        out[f"no doubles {ceiling}"] = pool[np.append(kept, spare).astype(int)]
    return out


def errors(q: Any, k: Any, v: Any, budgets: list[int]) -> dict[tuple[int, str], list[float]]:
    """Of one layer, by budget and rule."""
    dim, group, tokens = k.shape[2], len(q) // len(k), k.shape[1]
    values = decoded(k, v)
    out: dict[tuple[int, str], list[float]] = {}
    for head in range(len(q)):
        keys, exact = k[head // group], v[head // group]
        last = min(tokens - WINDOW, values.shape[1])
        unit = values[head // group] / np.linalg.norm(values[head // group], axis=1, keepdims=True)
        for at in range(q.shape[1]):
            seen = tokens - q.shape[1] + at + 1
            score = keys[:seen].astype(np.float64) @ q[head, at] * dim**-0.5
            weight = np.exp(score - score.max())
            dense = weight @ exact[:seen] / weight.sum()
            packed = np.arange(SINKS, last)
            order = packed[np.argsort(-weight[packed], kind="stable")]
            always = np.setdiff1d(np.arange(seen), packed)
            for budget in budgets:
                for name, kept in rules(order, unit, budget).items():
                    chosen = np.concatenate([always, kept])
                    got = weight[chosen] @ exact[chosen] / weight[chosen].sum()
                    error = np.linalg.norm(got - dense) / np.linalg.norm(dense)
                    out.setdefault((budget, name), []).append(float(error))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", default=["genesis", "licences", "code"])
    parser.add_argument("--length", type=int, default=3072)
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, tokenizer = models.load("smollm2")
    every: dict[tuple[int, str], list[float]] = {}
    for name in args.texts:
        ids = tokenizer(texts.read(name), add_special_tokens=False, return_tensors="pt")["input_ids"][0, : args.length]
        for layer in states(model, ids, args.queries):
            for where, found in errors(*layer, args.budgets).items():
                every.setdefault(where, []).extend(found)
    rows = [{"budget": k, "rule": rule, "error": float(np.mean(x)), "of": len(x)} for (k, rule), x in every.items()]
    for row in rows:
        print(f"{row['budget']:5d} {row['rule']:28s} {row['error']:.4f}")
    if args.json:
        setting = {"texts": args.texts, "length": args.length, "queries": args.queries}
        write_json(args.json, {"rows": rows, "setting": setting, "env": environment()})


if __name__ == "__main__":
    main()
