"""Decode attention on CUDA against FP16 attention of the same run: torch SDPA's flash and cuDNN kernels.

Every figure is the median over CUDA graph replays that walk over several copies of the cache, more than the L2 holds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from forgeattention import ops
from forgeattention.backends.cuda import nvrtc, plans
from forgeattention.backends.cuda.launch import limits
from forgeattention.codec import Codec, CodecSpec
from forgeattention.codec.presets import PRESETS
from forgeattention.ops.table import ExactTokens, PageTable

# batch, q_heads, kv_heads, head_dim, context, query tokens
SHAPES = [
    (1, 32, 8, 128, 32768, 1),
    (1, 32, 8, 128, 131072, 1),
    (1, 32, 8, 128, 524288, 1),
    (8, 32, 8, 128, 32768, 1),
    (8, 32, 8, 128, 131072, 1),
    (16, 9, 3, 64, 8192, 1),
    (1, 64, 8, 128, 131072, 1),
    (1, 28, 4, 128, 131072, 1),
    (8, 4, 1, 256, 32768, 1),
    (64, 32, 8, 128, 2048, 1),
    (256, 32, 8, 128, 1024, 1),
    (1, 32, 8, 128, 131072, 2),
    (1, 32, 8, 128, 131072, 4),
    (1, 32, 8, 128, 131072, 8),
]
SINKS_AND_WINDOW = 132 + 31
L2_TIMES = 3
sdpa = torch.nn.functional.scaled_dot_product_attention
# Pages in random order in memory; else each row's pages follow each other, as after one prefill.
SCATTERED = False


def median_us(replay: Callable[[], None], launches: int, repeats: int = 50) -> float:
    for _ in range(3):
        replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / launches)
    return sorted(times)[len(times) // 2]


def in_graph(calls: list[Callable[[], Any]], rounds: int) -> float:
    """Median us per call in a CUDA graph of rounds x calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    return median_us(graph.replay, rounds * len(calls), 30)


def copy_bandwidth() -> float:
    """GB/s read plus written by a device-to-device copy of 4 GB."""
    a = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    b = torch.empty_like(a)
    us = median_us(lambda: b.copy_(a), 1, 20)
    return 2 * a.numel() * 4 / us * 1e-3


def packed_calls(
    codec: Codec, batch: int, q_heads: int, context: int, copies: int, n: int = 1
) -> tuple[list[Callable[[], Any]], Any]:
    """Calls over `copies` caches of encoded random vectors, and what is needed to check the first."""
    kv_heads, d = codec.kv_heads, codec.head_dim
    pages = batch * context // 64
    buffer = torch.empty(copies * pages * codec.page_bytes, dtype=torch.uint8, device="cuda")
    step = min(pages, 4096)
    generator = torch.Generator("cuda").manual_seed(1)
    for start in range(0, copies * pages, step):
        count = min(step, copies * pages - start)
        if start == 0:  # fresh vectors for the first pages, then copies of their records
            k, v = (
                torch.randn(kv_heads, 64 * count, d, device="cuda", dtype=torch.float16, generator=generator)
                for _ in range(2)
            )
            ops.encode(k, v, codec, buffer, torch.arange(count, device="cuda") * codec.page_bytes)
            del k, v
        else:
            buffer[start * codec.page_bytes : (start + count) * codec.page_bytes] = buffer[: count * codec.page_bytes]
    order = torch.arange(copies * pages, device="cuda")
    if SCATTERED:
        order = torch.randperm(copies * pages, generator=torch.Generator().manual_seed(2)).cuda()
    offsets = (order * codec.page_bytes).reshape(copies, batch, context // 64)
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    q = torch.randn(batch, q_heads, n, d, device="cuda", dtype=torch.float16, generator=generator)
    ek, ev = (
        torch.randn(batch, kv_heads, 200, d, device="cuda", dtype=torch.float16, generator=generator) for _ in range(2)
    )
    recent = torch.full((batch,), SINKS_AND_WINDOW, dtype=torch.int32, device="cuda")
    exact = ExactTokens(ek, ev, recent, SINKS_AND_WINDOW)
    tables = [PageTable(buffer, offsets[i].contiguous(), lengths, context) for i in range(copies)]
    scale = 1 / math.sqrt(d)
    calls = [lambda t=t: ops.decode_attention(q, codec, t, exact, scale, causal=False) for t in tables]
    return calls, (q, tables[0], exact, scale)


def relative_error(codec: Codec, setup: Any, out: torch.Tensor) -> float:
    """Of the first row, against float64 over the decoded pages."""
    q, table, exact, scale = setup
    one = PageTable(table.base, table.page_table[:1], table.lengths[:1], table.max_length)
    k, v = ops.decode_pages(codec, one)
    group, recent = q.shape[1] // codec.kv_heads, SINKS_AND_WINDOW
    error = norm = 0.0
    for h in range(codec.kv_heads):
        keys = torch.cat([k[0, h], exact.k[0, h, :recent].float()]).double()
        values = torch.cat([v[0, h], exact.v[0, h, :recent].float()]).double()
        rows = slice(h * group, (h + 1) * group)
        want = torch.softmax(scale * q[0, rows].double() @ keys.T, -1) @ values
        error += float((out[0, rows].double() - want).square().sum())
        norm += float(want.square().sum())
    return math.sqrt(error / norm)


def peers_us(batch: int, q_heads: int, kv_heads: int, d: int, context: int, n: int, copies: int) -> dict[str, float]:
    """FP16 attention over as many tokens; copies share their values only if memory is short."""
    tokens = context + SINKS_AND_WINDOW
    q = torch.randn(batch, q_heads, n, d, device="cuda", dtype=torch.float16)
    kv = [
        tuple(torch.randn(batch, kv_heads, tokens, d, device="cuda", dtype=torch.float16) for _ in range(2))
        for _ in range(copies)
    ]
    out = {}
    for name, backend in (
        ("sdpa_flash_fp16", SDPBackend.FLASH_ATTENTION),
        ("sdpa_cudnn_fp16", SDPBackend.CUDNN_ATTENTION),
    ):
        for fold in (False, True):
            # Folding the group into the query length is the same result, as nothing is masked, and often faster.
            queries = q.reshape(batch, kv_heads, q_heads // kv_heads * n, d) if fold else q
            try:
                with sdpa_kernel(backend):
                    calls = [lambda k=k, v=v, x=queries, gqa=not fold: sdpa(x, k, v, enable_gqa=gqa) for k, v in kv]
                    out[name + ("_folded" if fold else "")] = in_graph(calls, max(1, 8 // copies))
            except RuntimeError as failure:
                print(f"  {name} fold={fold}: {str(failure).splitlines()[0][:100]}", flush=True)
    return out


def run(shape: tuple[int, ...], spec: CodecSpec, copy_gb_s: float, peers: dict[str, float] | None) -> dict[str, Any]:
    batch, q_heads, kv_heads, d, context, n = shape
    codec = Codec(spec, d, kv_heads)
    nbytes = batch * context // 64 * codec.page_bytes
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(1, min(8, math.ceil(L2_TIMES * l2 / nbytes)))
    calls, setup = packed_calls(codec, batch, q_heads, context, copies, n)
    error = relative_error(codec, setup, calls[0]()[0])
    us = in_graph(calls, max(1, 16 // copies))
    single = median_us(lambda: calls[0](), 1, 50)
    if peers is None:
        fp16_copies = max(1, min(4, math.ceil(L2_TIMES * l2 / (batch * context * kv_heads * d * 4))))
        peers = peers_us(*shape, fp16_copies)
    plan = plans.decode_plan(codec.format, kv_heads, q_heads // kv_heads * n, limits(0))
    kernel = nvrtc.kernel("decode_attention", plan.macros(codec, "float16", "float16"), 0, plan.shared_bytes)
    best = min(peers.values()) if peers else math.nan
    return {
        "op": "decode_attention",
        "device": torch.cuda.get_device_name(),
        "shape": dict(zip(("batch", "q_heads", "kv_heads", "head_dim", "context", "q_len"), shape, strict=True)),
        "k_bits": spec.k_bits,
        "v_bits": spec.v_bits,
        "k_code": spec.k_code,
        "v_code": spec.v_code,
        "scales": spec.scales,
        "effective_bits": codec.format.effective_bits,
        "us": us,
        "us_single_launch": single,
        "gb_s": nbytes / us * 1e-3,
        "share_of_copy": nbytes / us * 1e-3 / copy_gb_s,
        "peers_us": peers,
        "ratio": best / us,
        "rel_error": error,
        "registers": kernel.registers,
        "local_bytes": kernel.local_bytes,
        "ctas_per_sm": kernel.occupancy(32 * plan.warps),
        "warps_per_cta": plan.warps,
        "stage_pages": plan.stage_pages,
        "stages": plan.stages,
    }


SPECS = {
    "scalar": CodecSpec(k_code="scalar", v_code="scalar", scales="log8"),
    "trellis8_k": CodecSpec(k_code="trellis8", v_code="scalar", scales="log8"),
    "small": PRESETS["small"],
    "fidelity": PRESETS["fidelity"],
}


def environment(copy_gb_s: float) -> dict[str, Any]:
    commit = os.environ.get("FORGEATTENTION_COMMIT", "")  # where the working tree is no repository
    commit = commit or subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "backend": nvrtc.available()[1],
        "copy_gb_s": copy_gb_s,
        "commit": commit or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--specs", default=",".join(SPECS))
    parser.add_argument("--shapes", default="", help="indices into SHAPES, all by default")
    parser.add_argument("--scattered", action="store_true", help="pages in random order in memory")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--plan", default="", help="warps=8,ctas=2,stage_pages=2: a launch unlike the library's choice")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further shape is begun")
    options = parser.parse_args()
    if options.scattered:
        globals()["SCATTERED"] = True
    if options.plan:
        plans.decode_plan = partial(
            plans.decode_plan, **{k: int(v) for k, v in (x.split("=") for x in options.plan.split(","))}
        )
    begun, copy = time.time(), copy_bandwidth()
    records: list[dict[str, Any]] = [{"env": environment(copy)}]
    print(f"{torch.cuda.get_device_name()}: copy {copy:.0f} GB/s")
    for i in [int(x) for x in options.shapes.split(",") if x] or range(len(SHAPES)):
        peers = {} if options.no_peers else None
        for name in options.specs.split(","):
            if time.time() - begun > options.budget:
                continue
            r = run(SHAPES[i], SPECS[name], copy, peers)
            peers = r["peers_us"]
            records.append(r)
            print(
                f"{SHAPES[i]} {name:12} {r['us']:8.1f} us (single {r['us_single_launch']:.1f}) {r['gb_s']:5.0f} GB/s "
                f"{100 * r['share_of_copy']:4.0f} % of copy, "
                f"FP16 {min(peers.values(), default=math.nan):7.1f} us, {r['ratio']:.2f}x, "
                f"error {r['rel_error']:.1e}, {r['registers']} registers, {r['ctas_per_sm']} CTAs/SM",
                flush=True,
            )
            if options.json:
                options.json.write_text(json.dumps(records, indent=1))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
