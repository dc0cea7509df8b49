"""`forgeattn bench decode --device cpu`: one new token's attention, beside torch's over the same values."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ... import ops
from ...codec import PAGE, Codec
from ...codec.spec import CodecSpec
from ...ops.table import PageTable
from ...util.environment import environment
from ...util.progress import progress
from ..evaluation.setup import spec_from
from .records import record

# Calls walk over copies of a cache until so many bytes have passed, so that no cache level keeps it between two calls.
EVICTING_BYTES = 128 << 20
READ_BYTES = 1 << 29
ROUNDS = 15
SLOW_SECONDS = 20.0
PEER_DTYPES = ("float32", "bfloat16", "float16")


def decode(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every context and batch of the command line; prints a table and returns the records, `env` first."""
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
        ops.set_num_threads(args.threads)
    spec = spec_from(args)
    read_gb_s = read_bandwidth()
    env = {
        **environment(),
        "threads": ops.get_num_threads(),
        "read_gb_s": read_gb_s,
        "backend": _backend(),
        "spec": spec.to_json(),
    }
    records: list[dict[str, Any]] = [{"op": "env", "env": env}]
    shapes = [(batch, context) for batch in args.batches for context in args.contexts]
    print(f"reading memory: {read_gb_s:.1f} GB/s with {env['threads']} threads; {env['backend']}")
    print(f"{'batch':>5} {'context':>8} {'us':>9} {'GB/s':>6} {'of read':>8} {'best peer':>10} {'ratio':>6}  peer")
    with progress("bench decode", len(shapes)) as advance:
        for batch, context in shapes:
            record = measure(spec, batch, args.q_heads, args.kv_heads, args.head_dim, context, read_gb_s)
            records.append(record)
            peer = min(record["peers_us"], key=record["peers_us"].get)
            print(
                f"{batch:>5} {context:>8} {record['us']:>9.0f} {record['gb_s']:>6.1f} {record['share_of_copy']:>8.2f} "
                f"{record['peers_us'][peer]:>10.0f} {record['ratio']:>6.1f}  {peer}",
                flush=True,
            )
            advance()
    return records


def measure(
    spec: CodecSpec, batch: int, q_heads: int, kv_heads: int, head_dim: int, context: int, read_gb_s: float
) -> dict[str, Any]:
    """One record: medians over rounds in which ours and the peers of one dtype take turns.

    `share_of_copy` is the time of one pass over the packed bytes at the machine's read bandwidth over our time, `ratio`
    the fastest peer's time over ours, `rel_error` the norm of our error over the norm of float32 attention over the
    same values.
    """
    import torch
    import torch.nn.functional as F

    codec = Codec(spec, head_dim, kv_heads)
    tables = _caches(codec, batch, context)
    size = batch * tables[0].page_table.shape[1] * codec.page_bytes
    scale = head_dim**-0.5
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(batch, q_heads, 1, head_dim, generator=generator)
    k, v = (torch.from_numpy(x) for x in ops.decode_pages(codec, tables[0]))

    def ours(i: int) -> Any:
        return ops.decode_attention(q, codec, tables[i % len(tables)], None, scale, causal=False)[0]

    expected = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    rel_error = float((ours(0) - expected).norm() / expected.norm())
    times: dict[str, list[float]] = {"ours": []}
    for dtype in PEER_DTYPES:
        qd, kd, vd = (x.to(getattr(torch, dtype)) for x in (q, k, v))
        copies = [(kd, vd)]
        for _ in range(_copies(2 * kd.numel() * kd.element_size()) - 1):
            copies.append((kd.clone(), vd.clone()))
        calls = {
            "ours": ours,
            f"sdpa {dtype} enable_gqa": _sdpa(qd, copies, scale, True),
            f"sdpa {dtype} folded": _sdpa(qd.view(batch, kv_heads, -1, head_dim), copies, scale, False),
        }
        for name, seconds in _take_turns(calls).items():
            times.setdefault(name, []).extend(seconds)
    shape = (batch, q_heads, kv_heads, head_dim, context)
    return record("cpu", shape, codec, size, read_gb_s, times, rel_error)


def read_bandwidth() -> float:
    """GB/s of one pass over half a gigabyte, read by the kernels' threads: the best of several."""
    from ...backends.cpu import native

    data = np.ones(READ_BYTES, np.uint8)
    passes = _take_turns({"read": lambda i: native.read_pass(data)})
    return READ_BYTES / min(passes["read"]) / 1e9


def _sdpa(q: Any, copies: list[tuple[Any, Any]], scale: float, gqa: bool) -> Callable[[int], Any]:
    """torch's attention over one of the copies of keys and values."""
    from torch.nn.functional import scaled_dot_product_attention

    def call(i: int) -> Any:
        k, v = copies[i % len(copies)]
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=gqa)

    return call


def _backend() -> str:
    return next(f"{row['backend']}: {row['reason']}" for row in ops.report() if row["backend"] == "cpu")


def _copies(size: int) -> int:
    return max(1, math.ceil(EVICTING_BYTES / size))


def _caches(codec: Codec, batch: int, context: int) -> list[PageTable]:
    """Tables of `batch` rows of random tokens, pages in random order, as many copies as `EVICTING_BYTES` asks for."""
    rng = np.random.default_rng(0)
    pages = -(-context // PAGE)
    pool = np.zeros(batch * pages * codec.page_bytes, np.uint8)
    offsets = rng.permutation(batch * pages).reshape(batch, pages).astype(np.int64) * codec.page_bytes
    step = 32
    for row in offsets:
        for first in range(0, pages, step):
            where = row[first : first + step]
            k, v = rng.standard_normal((2, codec.kv_heads, len(where) * PAGE, codec.head_dim), np.float32)
            ops.encode(k, v, codec, pool, where)
    lengths = np.full(batch, context, np.int32)
    pools = [pool] + [pool.copy() for _ in range(_copies(pool.size) - 1)]
    return [PageTable(p, offsets, lengths, context) for p in pools]


def _take_turns(calls: dict[str, Callable[[int], Any]]) -> dict[str, list[float]]:
    """Seconds of each call in up to `ROUNDS` rounds, at least 5, within about `SLOW_SECONDS`."""
    for call in calls.values():
        call(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for i in range(1, ROUNDS + 1):
        for name, call in calls.items():
            before = time.perf_counter()
            call(i)
            seconds[name].append(time.perf_counter() - before)
        if i >= 5 and time.perf_counter() - start > SLOW_SECONDS:
            break
    return seconds
