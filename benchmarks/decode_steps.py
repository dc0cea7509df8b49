"""Times of single decode steps on CUDA: pages coded inside the captured step, beside steps without a graph.

    python benchmarks/decode_steps.py [--json OUT] [--shapes 1.5b 8b]

Random weights of the models' true shapes in bfloat16. The worst step is what a user waits for: where pages are coded
outside the graph, every 64th step takes several times the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from forgeattention import DecodeGraph, ForgeCache
from forgeattention.util.environment import environment

SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "1.5b": (
        "qwen2",
        {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
         "num_attention_heads": 12, "num_key_value_heads": 2},
    ),
    "8b": (
        "llama",
        {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8},
    ),
}  # fmt: skip
CASES = ((1, 1024), (1, 8192), (8, 2048))
"""Rows and tokens of the prompt."""
STEPS, WARM_UP = 200, 8


def made(shape: str) -> Any:
    kind, sizes = SHAPES[shape]
    config = AutoConfig.for_model(kind, max_position_embeddings=1 << 17, **sizes)
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="forge", dtype=torch.bfloat16).eval()


@torch.inference_mode()
def steps_ms(model: Any, cache: Any, ids: torch.Tensor) -> dict[str, float]:
    """Median and worst milliseconds of `STEPS` steps after a prompt, the first ones left out."""
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token, times = ids[:, :1].clone(), []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    return {"median_ms": statistics.median(times[WARM_UP:]), "worst_ms": max(times[WARM_UP:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    args = parser.parse_args()
    records: list[dict[str, Any]] = [{"op": "env", **environment(), "gpu": torch.cuda.get_device_name()}]
    for shape in args.shapes:
        model = made(shape)
        for rows, context in CASES:
            ids = torch.randint(0, 1000, (rows, context), device="cuda")
            cache = ForgeCache(model, graph=False)
            with DecodeGraph(model, cache, max_length=context + STEPS + 64):
                graph = steps_ms(model, cache, ids)
            without = steps_ms(model, ForgeCache(model, graph=False), ids)
            record = {"op": "decode_step", "model": shape, "rows": rows, "context": context}
            records.append({**record, "graph": graph, "without": without})
            print(records[-1], flush=True)
        del model
        torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
