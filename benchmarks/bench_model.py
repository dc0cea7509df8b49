"""A whole model with the exact and with the packed cache: prefill time, decode tokens/s, cache bytes, peak memory.

    python benchmarks/bench_model.py --contexts 512 2048 7168 --json OUT
    python benchmarks/bench_model.py --device cuda --json OUT     # 8192 to 300000 tokens, see cuda_model.py

Steps of both caches alternate, so that a noisy machine is equally unkind to them; medians. Peak memory is of the
process during the prefill, above what it held before.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from transformers import DynamicCache

from forgeattention import models
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.tools.evaluation import memory, texts
from forgeattention.tools.evaluation.streaming import attention, step
from forgeattention.util.environment import environment
from forgeattention.util.files import write_json


def measure(model, ids: torch.Tensor, context: int, chunk: int, steps: int) -> dict:
    """One context: reads `context` tokens in pieces of `chunk` with both caches, then decodes `steps` tokens."""
    makers = {"exact": lambda: DynamicCache(config=model.config), "packed": lambda: ForgeCache(model)}
    caches, prefill, peak, seconds = {}, {}, {}, {name: [] for name in makers}
    for name, make in makers.items():
        with attention(model, "forge" if name == "packed" else None):
            caches[name] = make()
            memory.reset_peak_rss()
            before, start = memory.peak_rss(), time.perf_counter()
            for at in range(0, context, chunk):
                step(model, ids[:, at : min(at + chunk, context)], caches[name], keep=1)
            prefill[name], peak[name] = time.perf_counter() - start, memory.peak_rss() - before
    held = {name: memory.cache_bytes(cache) for name, cache in caches.items()}
    for i in range(steps):
        for name, cache in caches.items():
            with attention(model, "forge" if name == "packed" else None):
                start = time.perf_counter()
                step(model, ids[:, context + i : context + i + 1], cache, keep=1)
                seconds[name].append(time.perf_counter() - start)
    speed = {name: 1 / statistics.median(s) for name, s in seconds.items()}
    return {
        "op": "model",
        "context": context,
        "chunk": chunk,
        "tokens_per_s": speed,
        "decode_ratio": speed["packed"] / speed["exact"],
        "prefill_s": prefill,
        "prefill_ratio": prefill["packed"] / prefill["exact"],
        "bytes": held,
        "peak_rss_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", default=["llama-3.1-8b", "qwen2.5-7b", "smollm2-135m"], help="on CUDA")
    parser.add_argument("--memory", type=int, default=0, help="on CUDA: tokens of the first model's memory curve")
    parser.add_argument(
        "--contexts", type=int, nargs="+", help="default: 512 2048 7168, on CUDA 8192 32768 131072 300000"
    )
    parser.add_argument("--chunk", type=int, default=1024, help="tokens read at once (default %(default)s)")
    parser.add_argument("--steps", type=int, help="default: 32, on CUDA 160")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.device == "cuda":
        import cuda_model

        contexts = args.contexts or [8192, 32768, 131072, 300000]
        save = partial(write_json, args.json) if args.json else lambda found: None
        cuda_model.records(args.models, contexts, args.steps or 160, args.memory, save)
        return
    args.contexts, args.steps = args.contexts or [512, 2048, 7168], args.steps or 32
    model, tokenizer = models.load(args.model)
    ids = tokenizer(texts.read("licences"), add_special_tokens=False, return_tensors="pt")["input_ids"]
    measure(model, ids, 256, args.chunk, 4)
    records = [{"op": "env", "env": {**environment(), "threads": torch.get_num_threads(), "model": args.model}}]
    for context in args.contexts:
        records.append(r := measure(model, ids, context, args.chunk, args.steps))
        speed, read = r["tokens_per_s"], r["prefill_s"]
        held, peak = ({name: size / 1e6 for name, size in r[key].items()} for key in ("bytes", "peak_rss_bytes"))
        print(f"{context} tokens, packed / exact:")
        print(f"  decode {speed['packed']:.1f} / {speed['exact']:.1f} tokens/s ({r['decode_ratio']:.2f}x)")
        print(f"  prefill {read['packed']:.1f} / {read['exact']:.1f} s ({r['prefill_ratio']:.2f}x)")
        print(f"  cache {held['packed']:.1f} / {held['exact']:.1f} MB", end="")
        print(f", peak {peak['packed']:.0f} / {peak['exact']:.0f} MB", flush=True)
    if args.json:
        write_json(args.json, records)


if __name__ == "__main__":
    main()
