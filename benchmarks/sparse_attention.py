"""Sparse attention against the dense packed kernel and dense attention of the same run, on CUDA or a CPU.

Time and what is skipped depend on where the large scores lie. Three kinds of keys and queries:

- iid: independent normal keys and queries. Survivors are spread evenly, the worst case for skipping values.
- clustered: 24 runs per KV head of keys that point along a common direction which the queries share, 96 tokens long on
  average; survivors lie together.
- real: keys and queries of SmolLM2, see `benchmarks/real_states.py`.

On CUDA every time is the median over graph replays that walk over copies of the cache, more than the L2 holds; on a CPU
the median of calls that take turns.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_decode
import real_states
import torch
from cuda_decode import L2_TIMES, SINKS_AND_WINDOW
from result_format import sparse_rule

from forgeattention import ops
from forgeattention.codec import Codec, CodecSpec
from forgeattention.codec.spec import PAGE
from forgeattention.ops.table import ExactTokens, PageTable
from forgeattention.sparse import SparseLayer, SparseSpec
from forgeattention.tools.bench import cpu as bench
from forgeattention.util.environment import environment

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
CONTEXTS = {"cuda": (50_048, 131_072, 524_288, 1_048_576), "cpu": (50_048, 131_072, 524_288)}
Calls = dict[str, list[Callable[[], Any]]]


class Cuda:
    """Times in CUDA graphs."""

    device, dtype = "cuda", torch.float16

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name()
        self.env = cuda_decode.environment(cuda_decode.copy_bandwidth())

    def copies(self, size: int) -> int:
        return max(1, min(8, math.ceil(L2_TIMES * torch.cuda.get_device_properties(0).L2_cache_size / size)))

    def us(self, phases: Calls) -> dict[str, float]:
        found = {}
        for name, calls in phases.items():
            found[name] = cuda_decode.in_graph(calls, max(1, 12 // len(calls)))
        return found

    def peers(self, context: int) -> dict[str, float]:
        copies = 1 if context > 200_000 else 2
        return cuda_decode.peers_us(1, Q_HEADS, KV_HEADS, DIM, context, copies)


class Cpu:
    """Times of single calls, phases taking turns."""

    device, dtype, name = "cpu", torch.float32, "cpu"

    def __init__(self) -> None:
        backend = next(row["reason"] for row in ops.report() if row["backend"] == "cpu")
        self.env = {
            **environment(),
            "threads": ops.get_num_threads(),
            "copy_gb_s": bench.read_bandwidth(),
            "backend": backend,
        }

    def copies(self, size: int) -> int:
        return 1

    def us(self, phases: Calls) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in phases}
        for _ in range(9):
            for name, calls in phases.items():
                start = time.perf_counter()
                calls[0]()
                times[name].append(time.perf_counter() - start)
        return {name: 1e6 * statistics.median(taken[1:]) for name, taken in times.items()}

    def peers(self, context: int) -> dict[str, float]:
        q = torch.randn(1, KV_HEADS, Q_HEADS // KV_HEADS, DIM, dtype=torch.bfloat16)
        k, v = (torch.randn(1, KV_HEADS, context, DIM, dtype=torch.bfloat16) for _ in range(2))
        call = [lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)]
        return {"sdpa_bfloat16_folded": self.us({"sdpa": call})["sdpa"]}


Machine = Cuda | Cpu


def random_states(on: Machine, kind: str, context: int, part: slice, generator: torch.Generator) -> Any:
    """Keys [kv_heads, tokens of the part, head_dim]."""
    tokens = min(part.stop, context) - part.start
    k = torch.randn(KV_HEADS, tokens, DIM, device=on.device, dtype=on.dtype, generator=generator)
    if kind == "clustered":
        runs = torch.Generator().manual_seed(3)
        begin = torch.randint(context, (KV_HEADS, 24), generator=runs)
        size = torch.randint(32, 160, (KV_HEADS, 24), generator=runs)
        for head in range(KV_HEADS):
            for b, n in zip(begin[head].tolist(), size[head].tolist()):
                low, high = max(b - part.start, 0), min(b + n - part.start, tokens)
                if low < high:
                    k[head, low:high] += 0.6 * direction(on)[head]
    return k


def direction(on: Machine) -> torch.Tensor:
    return torch.randn(KV_HEADS, DIM, generator=torch.Generator().manual_seed(4)).to(on.device, on.dtype)


def make(on: Machine, kind: str, context: int, codec: Codec, states: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed pages [pages, page_bytes] and queries [1, q_heads, 1, head_dim]."""
    generator = torch.Generator(on.device).manual_seed(1)
    pages = context // PAGE
    buffer = torch.empty(pages, codec.page_bytes, dtype=torch.uint8, device=on.device)
    for start in range(0, context, 65536):
        part = slice(start, min(start + 65536, context))
        if kind == "real":
            k, v = (x[:, part].to(on.device) for x in states["kv"])
        else:
            k = random_states(on, kind, context, part, generator)
            v = torch.randn(k.shape, device=on.device, dtype=on.dtype, generator=generator)
        first = start // PAGE
        where = torch.arange(first, first + k.shape[1] // PAGE, device=on.device) * codec.page_bytes
        ops.encode(k, v, codec, buffer.view(-1), where)
    if kind == "real":
        return buffer, states["q"].to(on.device, on.dtype)
    q = torch.randn(1, Q_HEADS, 1, DIM, device=on.device, generator=generator)
    if kind == "clustered":
        q = 0.5 * q + 1.5 * direction(on).float().repeat_interleave(Q_HEADS // KV_HEADS, 0)[None, :, None]
    return buffer, q.to(on.dtype)


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
    keep |= (s == threshold.score[0, -group:]) & (torch.arange(length, device=q.device) <= threshold.last[0, -group:])
    heads = q[0, -group:, 0].double()
    packed = (heads @ k.T * DIM**-0.5).masked_fill(~keep, -math.inf)
    own = heads @ exact.k[0, -1, :SINKS_AND_WINDOW].double().T * DIM**-0.5
    weights = torch.cat([packed, own], 1).softmax(1)
    want = weights @ torch.cat([v, exact.v[0, -1, :SINKS_AND_WINDOW].double()])
    return float((got[0, -group:, 0].double() - want).norm() / want.norm())


class Case:
    """Packed and exact tokens of one distribution, in as many copies as the caches of the machine ask for."""

    def __init__(self, on: Machine, kind: str, context: int, spec: CodecSpec, states: Any) -> None:
        self.on, self.kind, self.context, self.spec = on, kind, context, spec
        self.codec, self.scale = Codec(spec, DIM, KV_HEADS), DIM**-0.5
        buffer, self.q = make(on, kind, context, self.codec, states)
        size, copies = buffer.numel(), on.copies(buffer.numel())
        memory = buffer.view(-1).repeat(copies) if copies > 1 else buffer.view(-1)
        del buffer
        lengths = torch.tensor([context], dtype=torch.int32, device=on.device)
        at = torch.arange(context // PAGE, device=on.device)[None] * self.codec.page_bytes
        self.tables = [PageTable(memory, at + i * size, lengths, context) for i in range(copies)]
        ek, ev = (torch.randn(1, KV_HEADS, 200, DIM, device=on.device, dtype=on.dtype) for _ in range(2))
        recent = torch.full((1,), SINKS_AND_WINDOW, dtype=torch.int32, device=on.device)
        self.exact = ExactTokens(ek, ev, recent, SINKS_AND_WINDOW)

    def own(self) -> Any:
        return ops.decode_attention(self.q, self.codec, None, self.exact, self.scale)

    def dense(self, table: PageTable) -> Any:
        return ops.decode_attention(self.q, self.codec, table, self.exact, self.scale)

    def record(self, us: dict[str, float], peers: dict[str, float], **more: Any) -> dict[str, Any]:
        sizes = {
            "batch": 1,
            "q_heads": Q_HEADS,
            "kv_heads": KV_HEADS,
            "head_dim": DIM,
            "context": self.context,
            "q_len": 1,
        }
        return {
            "op": "sparse_attention",
            "device": self.on.name,
            "shape": sizes,
            "distribution": self.kind,
            "k_code": self.spec.k_code,
            "v_code": self.spec.v_code,
            "us": us.pop("step"),
            "dense_us": us.pop("dense"),
            "phases_us": us,
            "peers_us": peers,
            **more,
        }


def run(case: Case, chosen: dict[str, Any], peers: dict[str, float]) -> dict[str, Any]:
    """All keys scored, the best tokens kept."""
    q, codec, exact, scale = case.q, case.codec, case.exact, case.scale
    other = case.own()
    scores = [ops.sparse_scores(q, codec, t, scale) for t in case.tables]
    limits = [ops.sparse_threshold(s, t, exact_lse=other[1], **chosen) for s, t in zip(scores, case.tables)]

    def step(table: PageTable) -> Any:
        own = case.own()
        s = ops.sparse_scores(q, codec, table, scale)
        limit = ops.sparse_threshold(s, table, exact_lse=own[1], **chosen)
        return ops.sparse_attention(s, limit, codec, table, other=own)

    made = list(zip(scores, limits, case.tables))
    us = case.on.us({
        "exact_tokens": [case.own],
        "scores": [lambda t=t: ops.sparse_scores(q, codec, t, scale) for t in case.tables],
        "threshold": [lambda s=s, t=t: ops.sparse_threshold(s, t, exact_lse=other[1], **chosen) for s, _, t in made],
        "attention": [lambda s=s, m=m, t=t: ops.sparse_attention(s, m, codec, t, other=other) for s, m, t in made],
        "step": [lambda t=t: step(t) for t in case.tables],
        "dense": [lambda t=t: case.dense(t) for t in case.tables],
    })  # fmt: skip
    error = error_of(codec, case.tables[0], q, limits[0], scores[0], step(case.tables[0])[0], exact)
    shares = skipped(scores[0], limits[0])
    fmt, pages = codec.format, case.context // PAGE * KV_HEADS
    value_bytes = (fmt.record_bytes - fmt.mean_offset) * pages * (1 - shares["pages_unread"])
    return case.record(
        us,
        peers,
        **chosen,
        **shares,
        kept_tokens=limits[0].kept.float().mean().item(),
        dropped_mass=limits[0].dropped.mean().item(),
        dropped_mass_worst=limits[0].dropped.max().item(),
        bytes_read=fmt.v_offset * pages + value_bytes,
        bytes_dense=fmt.record_bytes * pages,
        rel_error=error,
    )


def run_fast(case: Case, top_k: int, peers: dict[str, float]) -> dict[str, Any]:
    """Whole pages chosen by their means."""
    q, codec, exact, scale, tables = case.q, case.codec, case.exact, case.scale, case.tables
    layer = SparseLayer(SparseSpec(top_k=top_k, fast=True))
    step = layer.attend(q, codec, tables[0], exact, scale, True, None, "auto")[2]
    scores = ops.sparse_scores(q, codec, tables[0], scale)
    masses = scores.pages[..., 0] + scores.pages[..., 1].log()
    share = (masses - torch.logaddexp(masses.logsumexp(-1), case.own()[1])[..., None]).exp()
    read = step.fast[1].repeat_interleave(Q_HEADS // KV_HEADS, 1)[:, :, None]
    dropped = share.masked_fill(read, 0).sum(-1)
    us = case.on.us({
        "page_scores": [lambda t=t: ops.page_scores(q, codec, t, scale) for t in tables],
        "step": [lambda t=t: layer.attend(q, codec, t, exact, scale, True, None, "auto")[0] for t in tables],
        "dense": [lambda t=t: case.dense(t) for t in tables],
    })  # fmt: skip
    return case.record(
        us,
        peers,
        top_k=top_k,
        fast=True,
        **{name: x for name, x in step.statistics().items() if not name.startswith("dropped")},
        dropped_mass=dropped.mean().item(),
        dropped_mass_worst=dropped.max().item(),
    )


def describe(r: dict[str, Any]) -> str:
    phases = ", ".join(f"{name} {us:.1f}" for name, us in r["phases_us"].items())
    peer = min(r["peers_us"].values(), default=math.nan)
    return (
        f"{r['shape']['context']:>8} {r['distribution']:9} {sparse_rule(r)}: {r['us']:.1f} us ({phases}), dense "
        f"{r['dense_us']:.1f} us = {r['dense_us'] / r['us']:.2f}x, torch {peer:.1f} us, tiles skipped "
        f"{r['tiles_skipped']:.3f}, pages unread {r['pages_unread']:.3f}, kept {r['kept_tokens']:.0f}, bytes "
        f"{r['bytes_read'] / r['bytes_dense']:.3f}, dropped {r['dropped_mass']:.4f} ({r['dropped_mass_worst']:.4f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--kinds", nargs="*", default=["iid", "clustered"])
    parser.add_argument("--real", metavar="MODEL", help="also keys and queries of SmolLM2: smollm2 or where it lies")
    parser.add_argument("--fast", type=int, nargs="*", default=[16384, 32768, 65536], help="tokens read in fast mode")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    on: Machine = Cuda() if options.device == "cuda" else Cpu()
    records: list[dict[str, Any]] = [{"env": on.env}]

    def add(record: dict[str, Any]) -> None:
        records.append(record)
        print(describe(record), flush=True)
        if options.json:
            options.json.write_text(json.dumps(records, indent=1))

    for context in options.contexts or CONTEXTS[options.device]:
        peers = {} if options.no_peers else on.peers(context)
        states = real_states.states(context, options.real, on.device) if options.real else None
        for kind in [*options.kinds, *(["real"] if options.real else [])]:
            case = Case(on, kind, context, CodecSpec(refine=False), states)
            for top_k in options.fast:
                if 2 * top_k <= context:
                    add(run_fast(case, top_k, peers))
            add(run(case, {"top_k": 1024}, peers))
            if kind == "real":
                add(run(case, {"top_p": 0.995}, peers))


if __name__ == "__main__":
    main()
