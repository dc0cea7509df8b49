"""What an op costs on the host besides its kernel: microseconds and Python calls of one call, on few tokens.

    python benchmarks/op_overhead.py [--device cpu|cuda|stand-in] [--json FILE]

On the CPU the native call alone, with the same arguments, is measured too. On CUDA the kernel runs beside the host, so
that the time of a call in a series is the host's alone, as long as that is the larger one; both are in the record.
"stand-in" measures CUDA's launchers where there is no GPU (stand_in_device.py): without the driver's part of a launch.
Series take turns; of each call the tenth percentile is told, as other work on the machine only adds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import stand_in_device
import torch

from forgeattention import ops
from forgeattention.codec import PAGE, Codec, CodecSpec
from forgeattention.ops.table import ExactTokens, PageTable
from forgeattention.util.environment import environment
from forgeattention.util.files import write_json

HEADS, KV_HEADS, DIM = 9, 3, 64


def python_calls(call: Callable[[], Any]) -> int:
    """Python functions that a call enters."""
    count = 0

    def note(_frame: Any, event: str, _arg: Any) -> None:
        nonlocal count
        count += event == "call"

    call()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def times(calls: dict[str, Callable[[], Any]], device: str, series: int = 400, length: int = 10) -> dict[str, float]:
    """Microseconds of one call on the host's clock: the tenth percentile of the series."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(series):
        for name, call in calls.items():
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(length):
                call()
            found[name].append((time.perf_counter() - begun) / length * 1e6)
            if device == "cuda":
                torch.cuda.synchronize()
    return {name: sorted(values)[series // 10] for name, values in found.items()}


def kernel_times(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median microseconds of a call in a CUDA graph, which costs the host nothing."""
    out = {}
    for name, call in calls.items():
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                call()
        spans = []
        for _ in range(20):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            spans.append(begin.elapsed_time(end) / 20 * 1e3)
        out[name] = median(spans)
    return out


def calls_of(device: str, packed: int, exact: int, stand_in: bool = False) -> dict[str, Callable[[], Any]]:
    codec = Codec(CodecSpec(), DIM, KV_HEADS)
    rng = np.random.default_rng(0)
    dtype = torch.float32 if device == "cpu" and not stand_in else torch.float16
    backend = "cuda" if stand_in else "auto"
    pages = packed // PAGE
    base = torch.zeros(max(1, pages) * codec.page_bytes, dtype=torch.uint8, device=device)
    offsets = torch.arange(pages, dtype=torch.int64, device=device)[None] * codec.page_bytes
    k, v = (torch.from_numpy(rng.standard_normal((KV_HEADS, packed, DIM))).to(device, dtype) for _ in range(2))
    ops.encode(k, v, codec, base, offsets[0], backend=backend)
    table = PageTable(base, offsets, torch.tensor([packed], dtype=torch.int32, device=device), packed, uniform=True)
    ek, ev = (torch.zeros(1, KV_HEADS, 256, DIM, dtype=dtype, device=device) for _ in range(2))
    lengths = torch.tensor([exact], dtype=torch.int32, device=device)
    grown = lengths.clone()
    held = ExactTokens(ek, ev, lengths, exact)
    q = torch.zeros(1, HEADS, 1, DIM, dtype=dtype, device=device)
    chunk = torch.zeros(1, HEADS, 64, DIM, dtype=dtype, device=device)
    one = torch.zeros(1, KV_HEADS, 1, DIM, dtype=dtype, device=device)
    attend = ops.PreparedDecode(q, codec, table, held, 0.125, backend=backend)
    out: dict[str, Callable[[], Any]] = {
        "decode_attention": lambda: ops.decode_attention(q, codec, table, held, 0.125, backend=backend),
        "decode_attention, prepared": lambda: attend(q, table, held),
        "decode_attention, prepared, a token more each time": lambda: attend(q, table, held.grown(exact)),
        "qk_scores": lambda: ops.qk_scores(q, codec, table, 0.125, backend=backend),
        "sparse_scores": lambda: ops.sparse_scores(q, codec, table, 0.125, backend=backend),
        "append_tokens": lambda: (grown.fill_(exact), ops.append_tokens(ek, ev, grown, one, one, backend=backend)),
        "encode of a page": lambda: ops.encode(k[:, :PAGE], v[:, :PAGE], codec, base, offsets[0, :1], backend=backend),
    }
    if not stand_in:  # it runs torch's attention, too
        out["prefill_attention of 64 queries"] = lambda: ops.prefill_attention(chunk, codec, table, 0.125)
    if device == "cpu" and not stand_in:
        out["decode_attention, the native call alone"] = native_call(q, codec, table, held)
    return out


def native_call(q: Any, codec: Codec, table: PageTable, held: ExactTokens) -> Callable[[], Any]:
    """The call into the native module that `decode_attention` makes."""
    from forgeattention.backends.cpu import attention

    module, recorded = attention.native, []

    class Recorder:
        def attention(self, *args: Any) -> None:
            recorded.append(args)
            module.attention(*args)

    attention.native = Recorder()
    try:
        kept = ops.decode_attention(q, codec, table, held, 0.125)  # the arguments hold addresses of these results
    finally:
        attention.native = module
    arguments = recorded[0]
    return lambda: (kept, module.attention(*arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "stand-in"))
    parser.add_argument("--packed", type=int, default=128)
    parser.add_argument("--exact", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ops.set_num_threads(1)
    stand_in = args.device == "stand-in"
    with stand_in_device.stand_in() if stand_in else nullcontext():
        calls = calls_of("cpu" if stand_in else args.device, args.packed, args.exact, stand_in)
        spent = times(calls, args.device)
        counts = {name: python_calls(call) for name, call in calls.items()}
    # What cuDNN plans at its first call cannot be captured.
    captured = {name: call for name, call in calls.items() if not name.startswith("prefill")}
    kernels = kernel_times(captured) if args.device == "cuda" else {}
    records = [
        {"op": "op_overhead", "call": name, "us": spent[name], "python_calls": counts[name]}
        | ({"kernel_us": kernels[name]} if name in kernels else {})
        for name in calls
    ]
    for r in records:
        kernel = f", kernel {r['kernel_us']:.1f} us" if "kernel_us" in r else ""
        print(f"{r['call']:<52} {r['us']:8.1f} us, {r['python_calls']} Python calls{kernel}")
    shape = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "packed": args.packed, "exact": args.exact}
    shape |= {"device": args.device}
    if args.json:
        write_json(args.json, [{"op": "env", "env": environment()}, *(r | shape for r in records)])


if __name__ == "__main__":
    main()
