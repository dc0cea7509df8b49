"""`forgeattn bench decode --device metal`: attention of one new token in MLX, beside MLX's own and mlx-lm's caches."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ... import ops
from ...backends.metal import plan
from ...codec import PAGE, Codec
from ...codec.spec import CodecSpec
from ...ops.table import PageTable
from ...util.environment import environment
from ...util.progress import progress
from ..evaluation.setup import spec_from
from .records import record

ROUND_SECONDS = 0.05
ROUNDS = 15
COPY_BYTES = 1 << 28


def decode(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every context and batch of the command line on this Mac's GPU; prints a table and returns the records,
    `env` first."""
    import mlx.core as mx

    if not mx.metal.is_available():
        raise ValueError("[bench] expected a Mac with a Metal device for --device metal; got none")
    spec = spec_from(args)
    copy_gb_s = copy_bandwidth()
    device = mx.device_info(mx.gpu)
    env = {**environment(), "device": device["device_name"], "memory_bytes": device["memory_size"]}
    env |= {"copy_gb_s": copy_gb_s, "spec": spec.to_json()}
    if args.tune:
        env["tuned"] = tune(args, spec, device["device_name"])
    records: list[dict[str, Any]] = [{"op": "env", "env": env}]
    shapes = [(batch, context) for batch in args.batches for context in args.contexts]
    print(f"{env['device']}: copying memory at {copy_gb_s:.0f} GB/s")
    names = ("us", "GB/s", "fp16 us", "8 bit us", "4 bit us", "ratio", "MB", "fp16 MB", "tokens/s")
    print(f"{'batch':>5} {'context':>8}", *(f"{name:>9}" for name in names))
    with progress("bench decode", len(shapes)) as advance:
        for batch, context in shapes:
            r = measure(spec, batch, args.q_heads, args.kv_heads, args.head_dim, context, copy_gb_s)
            records.append(r)
            us = [r["us"], *(r["peers_us"][name] for name in ("mlx float16", "mlx-lm 8 bit", "mlx-lm 4 bit"))]
            figures = [f"{us[0]:.0f}", f"{r['gb_s']:.0f}", *(f"{t:.0f}" for t in us[1:]), f"{r['ratio']:.2f}"]
            sizes = [f"{size / 1e6:.1f}" for size in (r["packed_bytes"], r["peers_bytes"]["mlx float16"])]
            cells = [*figures, *sizes, f"{r['tokens_per_s']:.0f}"]
            print(f"{batch:>5} {context:>8}", *(f"{cell:>9}" for cell in cells), flush=True)
            advance()
    return records


def tune(args: argparse.Namespace, spec: CodecSpec, gpu: str) -> dict[str, Any]:
    """Tries every number of rows that a block can have (`backends.metal.plan`) on the shapes of the command line,
    prints their times, and keeps what was fastest in all for this GPU and head_dim in the user's cache folder.

    Returns:
        Microseconds of a decode step by rows, summed over the shapes, what was kept and where.
    """
    import mlx.core as mx

    codec, group = Codec(spec, args.head_dim, args.kv_heads), args.q_heads // args.kv_heads
    total: dict[int, float] = {}
    for batch in args.batches:
        for context in args.contexts:
            table = random_table(codec, batch, context)
            q = mx.random.normal((batch, args.q_heads, 1, args.head_dim)).astype(mx.float16)

            def step(q: Any, rows: int, table: PageTable = table) -> Any:
                with plan.override(rows):
                    return ops.decode_attention(q, codec, table, None, args.head_dim**-0.5, causal=False)[0]

            # More rows than a KV head has query heads make the same blocks.
            tried = [rows for rows in plan.CHOICES if rows < 2 * group]
            times = _take_turns({str(rows): partial(step, rows=rows) for rows in tried}, q)
            for rows in tried:
                total[rows] = total.get(rows, 0.0) + statistics.median(times[str(rows)]) * 1e6
    best = min(total, key=lambda rows: total[rows])
    file = plan.keep(gpu, {codec.format.padded_dim: best})
    print(
        "rows a block: "
        + ", ".join(f"{rows} {us:.0f} us" for rows, us in total.items())
        + f"; {best} is kept in {file}"
    )
    return {"us": {str(rows): us for rows, us in total.items()}, "kept": best, "file": str(file)}


def measure(
    spec: CodecSpec, batch: int, q_heads: int, kv_heads: int, head_dim: int, context: int, copy_gb_s: float
) -> dict[str, Any]:
    """One record: medians over rounds in which ours and the peers take turns, on MLX's default device.

    A round is a chain of calls, each on the result of the one before, so that none overlaps another; each is sent off
    at once, as mlx-lm does with every token, so that the processor prepares the next while the device works.
    `share_of_copy` is the time of one pass over the packed bytes at the copy bandwidth over our time, `ratio` the
    fastest peer's time over ours, `rel_error` the norm of our error over the norm of MLX's attention in float32 over
    the same values, `tokens_per_s` what one layer's attention alone would allow.
    """
    import mlx.core as mx
    from mlx_lm.models.base import quantized_scaled_dot_product_attention as quantized

    codec = Codec(spec, head_dim, kv_heads)
    table = random_table(codec, batch, context)
    size = batch * table.page_table.shape[1] * codec.page_bytes
    scale = head_dim**-0.5
    q = mx.array(np.random.default_rng(1).standard_normal((batch, q_heads, 1, head_dim), np.float32)).astype(mx.float16)
    k, v = (x.astype(mx.float16) for x in ops.decode_pages(codec, table))
    mx.eval(q, k, v)

    calls: dict[str, Callable[[Any], Any]] = {
        "ours": lambda q: ops.decode_attention(q, codec, table, None, scale, causal=False)[0],
        "mlx float16": lambda q: mx.fast.scaled_dot_product_attention(q, k, v, scale=scale),
    }
    held = {"mlx float16": k.nbytes + v.nbytes}
    for bits in (8, 4):
        keys, values = (mx.quantize(x, group_size=64, bits=bits) for x in (k, v))
        mx.eval(keys, values)
        held[f"mlx-lm {bits} bit"] = sum(x.nbytes for x in (*keys, *values))

        def call(q: Any, keys: Any = keys, values: Any = values, bits: int = bits) -> Any:
            return quantized(q, keys, values, scale, None, group_size=64, bits=bits)

        calls[f"mlx-lm {bits} bit"] = call
    expected = mx.fast.scaled_dot_product_attention(*(x.astype(mx.float32) for x in (q, k, v)), scale=scale)
    error = calls["ours"](q).astype(mx.float32) - expected
    rel_error = float(mx.linalg.norm(error.reshape(-1)) / mx.linalg.norm(expected.reshape(-1)))
    times = _take_turns(calls, q)
    shape = (batch, q_heads, kv_heads, head_dim, context)
    result = record(str(mx.default_device()), shape, codec, size, copy_gb_s, times, rel_error)
    return {**result, "tokens_per_s": batch / result["us"] * 1e6, "peers_bytes": held}


def copy_bandwidth() -> float:
    """GB/s, read and written, of a copy of a quarter of a gigabyte on MLX's default device: the best of several."""
    import mlx.core as mx

    x = mx.ones((COPY_BYTES // 4,), dtype=mx.float32)
    mx.eval(x)
    times = _take_turns({"copy": lambda x: x + 1.0}, x)
    return 2 * COPY_BYTES / min(times["copy"]) / 1e9


def random_table(codec: Codec, batch: int, context: int) -> PageTable:
    """`batch` rows of random tokens, pages in random order."""
    import mlx.core as mx

    rng = np.random.default_rng(0)
    pages = -(-context // PAGE)
    base = mx.zeros((batch * pages * codec.page_bytes,), dtype=mx.uint8)
    offsets = rng.permutation(batch * pages).reshape(batch, pages).astype(np.int64) * codec.page_bytes
    for row in offsets:
        for first in range(0, pages, 32):
            where = row[first : first + 32]
            k, v = mx.random.normal((2, codec.kv_heads, len(where) * PAGE, codec.head_dim))
            ops.encode(k, v, codec, base, mx.array(where))
            mx.eval(base)
    return PageTable(base, mx.array(offsets), mx.array(np.full(batch, context, np.int32)), context)


def _take_turns(calls: dict[str, Callable[[Any], Any]], x: Any) -> dict[str, list[float]]:
    """Seconds per call of each, in rounds of calls that follow one another."""
    import mlx.core as mx

    def seconds(call: Callable[[Any], Any], count: int) -> float:
        start = time.perf_counter()
        y = x
        for _ in range(count):
            y = call(y)
            mx.async_eval(y)
        mx.eval(y)
        return (time.perf_counter() - start) / count

    counts = {}
    for name, call in calls.items():
        seconds(call, 1)
        counts[name] = max(1, min(200, round(ROUND_SECONDS / seconds(call, 2))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            found[name].append(seconds(call, counts[name]))
    return found
