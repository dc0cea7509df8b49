"""Sparse attention on CUDA against the dense packed kernel and FP16 attention of the same run.

Time and what is skipped depend on where the large scores lie. Three kinds of keys and queries:

- iid: independent normal keys and queries. Survivors are spread evenly, the worst case for skipping values.
- clustered: 24 runs per KV head of keys that point along a common direction which the queries share, 96 tokens long on
  average; survivors lie together.
- real: keys and queries of SmolLM2, see `benchmarks/real_states.py`.

Every time is the median over CUDA graph replays that walk over copies of the cache, more than the L2 holds.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import real_states
import torch
from cuda_decode import SINKS_AND_WINDOW, copy_bandwidth, environment, in_graph, peers_us

from forgeattention import ops
from forgeattention.codec import Codec, CodecSpec
from forgeattention.codec.spec import PAGE
from forgeattention.ops.table import ExactTokens, PageTable
from forgeattention.sparse import SparseLayer, SparseSpec

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
CONTEXTS = (50_048, 131_072, 524_288, 1_048_576)
L2_TIMES = 3


def random_states(kind: str, context: int, part: slice, generator: torch.Generator) -> Any:
    """Keys [kv_heads, tokens of the part, head_dim], float16."""
    tokens = min(part.stop, context) - part.start
    k = torch.randn(KV_HEADS, tokens, DIM, device="cuda", dtype=torch.float16, generator=generator)
    if kind == "clustered":
        runs = torch.Generator().manual_seed(3)
        begin = torch.randint(context, (KV_HEADS, 24), generator=runs)
        size = torch.randint(32, 160, (KV_HEADS, 24), generator=runs)
        for head in range(KV_HEADS):
            for b, n in zip(begin[head].tolist(), size[head].tolist()):
                low, high = max(b - part.start, 0), min(b + n - part.start, tokens)
                if low < high:
                    k[head, low:high] += 0.6 * direction()[head]
    return k


def direction() -> torch.Tensor:
    return torch.randn(KV_HEADS, DIM, generator=torch.Generator().manual_seed(4)).half().cuda()


def make(kind: str, context: int, codec: Codec, states: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed pages [pages, page_bytes] and queries [1, q_heads, 1, head_dim]."""
    generator = torch.Generator("cuda").manual_seed(1)
    pages = context // PAGE
    buffer = torch.empty(pages, codec.page_bytes, dtype=torch.uint8, device="cuda")
    for start in range(0, context, 65536):
        part = slice(start, min(start + 65536, context))
        if kind == "real":
            k, v = (x[:, part].cuda() for x in states["kv"])
        else:
            k = random_states(kind, context, part, generator)
            v = torch.randn(k.shape, device="cuda", dtype=torch.float16, generator=generator)
        first = start // PAGE
        where = torch.arange(first, first + k.shape[1] // PAGE, device="cuda") * codec.page_bytes
        ops.encode(k, v, codec, buffer.view(-1), where)
    if kind == "real":
        return buffer, states["q"].cuda()
    q = torch.randn(1, Q_HEADS, 1, DIM, device="cuda", generator=generator)
    if kind == "clustered":
        q = 0.5 * q + 1.5 * direction().repeat_interleave(Q_HEADS // KV_HEADS, 0)[None, :, None]
    return buffer, q.half()


def skipped(scores: Any, threshold: Any) -> dict[str, float]:
    """Shares of 256-token tiles and 64-token pages without a survivor of their query head; of pages that no head of a
    KV head needs."""
    live = scores.pages[..., 0] >= threshold.score[..., None]
    tiles = torch.nn.functional.pad(live, (0, -live.shape[-1] % 4)).unflatten(-1, (-1, 4)).any(-1)
    union = live.unflatten(1, (KV_HEADS, -1)).any(2)
    return {
        "tiles_skipped": 1 - tiles.float().mean().item(),
        "pages_skipped": 1 - live.float().mean().item(),
        "pages_unread": 1 - union.float().mean().item(),
    }


def error_of(codec: Codec, table: PageTable, q: Any, threshold: Any, scores: Any, got: Any, exact: Any) -> float:
    """Of the last KV head's queries against float64 over the tokens kept and the exact ones."""
    group, length = Q_HEADS // KV_HEADS, table.max_length
    k, v = (x[0, -1].double() for x in ops.decode_pages(codec, table))
    s = scores.scores[0, -group:, 0]
    keep = s > threshold.score[0, -group:]
    keep |= (s == threshold.score[0, -group:]) & (torch.arange(length, device="cuda") <= threshold.last[0, -group:])
    heads = q[0, -group:, 0].double()
    packed = (heads @ k.T * DIM**-0.5).masked_fill(~keep, -math.inf)
    own = heads @ exact.k[0, -1, :SINKS_AND_WINDOW].double().T * DIM**-0.5
    weights = torch.cat([packed, own], 1).softmax(1)
    want = weights @ torch.cat([v, exact.v[0, -1, :SINKS_AND_WINDOW].double()])
    return float((got[0, -group:, 0].double() - want).norm() / want.norm())


def run(kind: str, context: int, chosen: dict[str, Any], spec: CodecSpec, peers: dict[str, float], states: Any) -> Any:
    codec = Codec(spec, DIM, KV_HEADS)
    buffer, q = make(kind, context, codec, states)
    size, scale = buffer.numel(), DIM**-0.5
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(1, min(8, math.ceil(L2_TIMES * l2 / size)))
    memory = buffer.view(-1).repeat(copies)
    del buffer
    lengths = torch.tensor([context], dtype=torch.int32, device="cuda")
    at = torch.arange(context // PAGE, device="cuda")[None] * codec.page_bytes
    tables = [PageTable(memory, at + i * size, lengths, context) for i in range(copies)]
    ek, ev = (torch.randn(1, KV_HEADS, 200, DIM, device="cuda", dtype=torch.float16) for _ in range(2))
    recent = torch.full((1,), SINKS_AND_WINDOW, dtype=torch.int32, device="cuda")
    exact = ExactTokens(ek, ev, recent, SINKS_AND_WINDOW)
    other = ops.decode_attention(q, codec, None, exact, scale)
    scores = [ops.sparse_scores(q, codec, t, scale) for t in tables]
    limits = [ops.sparse_threshold(s, t, exact_lse=other[1], **chosen) for s, t in zip(scores, tables)]

    def step(table: PageTable) -> Any:
        own = ops.decode_attention(q, codec, None, exact, scale)
        s = ops.sparse_scores(q, codec, table, scale)
        limit = ops.sparse_threshold(s, table, exact_lse=own[1], **chosen)
        return ops.sparse_attention(s, limit, codec, table, other=own)

    rounds = max(1, 12 // copies)
    phases = {
        "exact_tokens": [lambda: ops.decode_attention(q, codec, None, exact, scale)],
        "scores": [lambda t=t: ops.sparse_scores(q, codec, t, scale) for t in tables],
        "threshold": [
            lambda s=s, t=t: ops.sparse_threshold(s, t, exact_lse=other[1], **chosen) for s, t in zip(scores, tables)
        ],
        "attention": [
            lambda s=s, l=l, t=t: ops.sparse_attention(s, l, codec, t, other=other)
            for s, l, t in zip(scores, limits, tables)
        ],
        "step": [lambda t=t: step(t) for t in tables],
        "dense": [lambda t=t: ops.decode_attention(q, codec, t, exact, scale) for t in tables],
    }
    error = error_of(codec, tables[0], q, limits[0], scores[0], step(tables[0])[0], exact)
    us = {name: in_graph(calls, rounds if len(calls) > 1 else 12)[0] for name, calls in phases.items()}
    shares = skipped(scores[0], limits[0])
    fmt, pages = codec.format, context // PAGE * KV_HEADS
    value_bytes = (fmt.record_bytes - fmt.mean_offset) * pages * (1 - shares["pages_unread"])
    key_bytes = fmt.v_offset * pages
    return {
        "op": "sparse_attention",
        "device": torch.cuda.get_device_name(),
        "shape": {
            "batch": 1,
            "q_heads": Q_HEADS,
            "kv_heads": KV_HEADS,
            "head_dim": DIM,
            "context": context,
            "q_len": 1,
        },
        "distribution": kind,
        **chosen,
        "k_code": spec.k_code,
        "v_code": spec.v_code,
        "us": us.pop("step"),
        "dense_us": us.pop("dense"),
        "phases_us": us,
        "peers_us": peers,
        **shares,
        "kept_tokens": limits[0].kept.float().mean().item(),
        "dropped_mass": limits[0].dropped.mean().item(),
        "dropped_mass_worst": limits[0].dropped.max().item(),
        "bytes_read": key_bytes + value_bytes,
        "bytes_dense": fmt.record_bytes * pages,
        "rel_error": error,
    }


def run_fast(kind: str, context: int, top_k: int, spec: CodecSpec, peers: dict[str, float], states: Any) -> Any:
    """The same for whole pages chosen by their means."""
    codec = Codec(spec, DIM, KV_HEADS)
    buffer, q = make(kind, context, codec, states)
    size, scale = buffer.numel(), DIM**-0.5
    copies = max(1, min(8, math.ceil(L2_TIMES * torch.cuda.get_device_properties(0).L2_cache_size / size)))
    memory = buffer.view(-1).repeat(copies)
    del buffer
    lengths = torch.tensor([context], dtype=torch.int32, device="cuda")
    at = torch.arange(context // PAGE, device="cuda")[None] * codec.page_bytes
    tables = [PageTable(memory, at + i * size, lengths, context) for i in range(copies)]
    ek, ev = (torch.randn(1, KV_HEADS, 200, DIM, device="cuda", dtype=torch.float16) for _ in range(2))
    exact = ExactTokens(ek, ev, torch.full((1,), SINKS_AND_WINDOW, dtype=torch.int32, device="cuda"), SINKS_AND_WINDOW)
    layer = SparseLayer(SparseSpec(top_k=top_k, fast=True))
    step = layer.attend(q, codec, tables[0], exact, scale, True, None, "auto")[2]
    scores = ops.sparse_scores(q, codec, tables[0], scale)
    own = ops.decode_attention(q, codec, None, exact, scale)[1]
    masses = scores.pages[..., 0] + scores.pages[..., 1].log()
    share = (masses - torch.logaddexp(masses.logsumexp(-1), own)[..., None]).exp()
    read = step.fast[1].repeat_interleave(Q_HEADS // KV_HEADS, 1)[:, :, None]
    rounds = max(1, 12 // copies)
    calls = [lambda t=t: layer.attend(q, codec, t, exact, scale, True, None, "auto")[0] for t in tables]
    phases = {
        "page_scores": [lambda t=t: ops.page_scores(q, codec, t, scale) for t in tables],
        "dense": [lambda t=t: ops.decode_attention(q, codec, t, exact, scale) for t in tables],
    }
    us = {name: in_graph(of, rounds)[0] for name, of in phases.items()}
    dropped = share.masked_fill(read, 0).sum(-1)
    return {
        "op": "sparse_attention",
        "device": torch.cuda.get_device_name(),
        "shape": {
            "batch": 1,
            "q_heads": Q_HEADS,
            "kv_heads": KV_HEADS,
            "head_dim": DIM,
            "context": context,
            "q_len": 1,
        },
        "distribution": kind,
        "top_k": top_k,
        "fast": True,
        "us": in_graph(calls, rounds)[0],
        "dense_us": us.pop("dense"),
        "phases_us": us,
        "peers_us": peers,
        **{name: x for name, x in step.statistics().items() if not name.startswith("dropped")},
        "dropped_mass": dropped.mean().item(),
        "dropped_mass_worst": dropped.max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--kinds", nargs="*", default=["iid", "clustered"])
    parser.add_argument("--real", metavar="MODEL", help="also keys and queries of SmolLM2: smollm2 or where it lies")
    parser.add_argument("--fast", type=int, nargs="*", default=[16384, 32768, 65536], help="tokens read in fast mode")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    records: list[dict[str, Any]] = [{"env": environment(copy_bandwidth())}]
    spec = CodecSpec(refine=False)
    for context in options.contexts:
        peers = {} if options.no_peers else peers_us(1, Q_HEADS, KV_HEADS, DIM, context, 1 if context > 200_000 else 2)
        states = real_states.states(context, options.real) if options.real else None
        for kind in [*options.kinds, *(["real"] if options.real else [])]:
            for top_k in options.fast:
                if 2 * top_k > context:
                    continue
                r = run_fast(kind, context, top_k, spec, peers, states)
                records.append(r)
                print(
                    f"{context:>8} {kind:9} fast {top_k}: {r['us']:.1f} us (page scores "
                    f"{r['phases_us']['page_scores']:.1f}), dense {r['dense_us']:.1f} us = "
                    f"{r['dense_us'] / r['us']:.2f}x, bytes {r['bytes_read'] / r['bytes_dense']:.3f}, "
                    f"dropped {r['dropped_mass']:.4f}, worst {r['dropped_mass_worst']:.4f}",
                    flush=True,
                )
            for chosen in ({"top_k": 1024}, {"top_p": 0.995}):
                if kind != "real" and "top_p" in chosen:
                    continue
                r = run(kind, context, chosen, spec, peers, states)
                records.append(r)
                phases = ", ".join(f"{name} {us:.1f}" for name, us in r["phases_us"].items())
                print(
                    f"{context:>8} {kind:9} {chosen}: {r['us']:.1f} us ({phases}), dense {r['dense_us']:.1f} us = "
                    f"{r['dense_us'] / r['us']:.2f}x, FP16 {min(peers.values(), default=math.nan):.1f} us, "
                    f"tiles skipped "
                    f"{r['tiles_skipped']:.3f}, pages unread {r['pages_unread']:.3f}, kept {r['kept_tokens']:.0f}, "
                    f"dropped {r['dropped_mass']:.4f}, error {r['rel_error']:.1e}",
                    flush=True,
                )
                if options.json:
                    options.json.write_text(json.dumps(records, indent=1))
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
