"""One long sequence over several processes: each holds a share of the packed pages.

    torchrun --nproc-per-node 2 -m forgeattention.tools.context_parallel --tokens 4096

Every rank runs the same model on the same tokens; rank 0 also runs it alone and compares. Prints bytes of cache per
rank, speeds of both, ms of attention per token (all layers), and how far the logits are apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from .. import models
from ..cache.sharded import Sharding
from ..integrations.hf.cache import ForgeCache
from ..util.environment import environment
from ..util.files import write_json
from .evaluation import texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of the prompt read at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds to wait for a rank, or for the run alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is printed here too, with the machine")
    args = parser.parse_args()
    backend, timeout = "nccl" if args.device == "cuda" else "gloo", timedelta(seconds=args.timeout)
    distributed.init_process_group(backend, timeout=timeout)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    model, tokenizer = models.load(args.model, device=args.device, attn_implementation="forge")
    ids = tokenizer(texts.read("genesis"), return_tensors="pt").input_ids[:, : args.tokens].to(args.device)
    shared = generate(model, ids, args, Sharding())
    ranks: list[Any] = [None] * world
    distributed.all_gather_object(ranks, {name: shared[name] for name in ("bytes", "read_work", "work")})
    if rank == 0:
        alone = generate(model, ids, args, None)
        result = {
            "ranks": world,
            "threads_per_rank": torch.get_num_threads(),
            "tokens": ids.shape[1],
            "bytes_per_rank": [rank["bytes"] for rank in ranks],
            "bytes_alone": alone["bytes"],
            "read_seconds": round(shared["read"], 2),
            "read_seconds_alone": round(alone["read"], 2),
            "read_processor_seconds": [round(rank["read_work"], 2) for rank in ranks],
            "read_processor_seconds_alone": round(alone["read_work"], 2),
            "tokens_per_second": round(shared["speed"], 2),
            "tokens_per_second_alone": round(alone["speed"], 2),
            "attention_ms": round(shared["attention"], 2),
            "attention_ms_alone": round(alone["attention"], 2),
            "processor_ms_per_token": [round(rank["work"] / args.new * 1e3, 1) for rank in ranks],
            "processor_ms_per_token_alone": round(alone["work"] / args.new * 1e3, 1),
            "largest_logit_difference": float((shared["logits"] - alone["logits"]).abs().max()),
            "same_tokens": shared["tokens"] == alone["tokens"],
        }
        print(json.dumps(result), flush=True)
        if args.json:
            write_json(args.json, {"env": environment(), **result})
    distributed.barrier()
    distributed.destroy_process_group()


@torch.inference_mode()
def generate(model: Any, ids: torch.Tensor, args: argparse.Namespace, sharding: Sharding | None) -> dict[str, Any]:
    """Greedy tokens after a prompt that is read in chunks; `work` is this process's processor time."""
    cache, times, work = ForgeCache(model, sharding=sharding), [time.perf_counter()], [time.process_time()]
    for at in range(0, ids.shape[1], args.chunk):
        piece = ids[:, at : at + args.chunk]
        out = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    logits, tokens = out.float().cpu(), []
    times.append(time.perf_counter())
    work.append(time.process_time())
    for _ in range(args.new):
        token = out.argmax(-1, keepdim=True)
        tokens.append(int(token))
        out = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
    times.append(time.perf_counter())
    work.append(time.process_time())
    layer = cache.layers[0].cache
    q, attention = torch.randn(1, model.config.num_attention_heads, 1, layer.codec.head_dim, device=ids.device), []
    for _ in range(30):
        start = time.perf_counter()
        layer.attend(q, 1.0)
        attention.append(time.perf_counter() - start)
    return {
        "bytes": cache.nbytes,
        "read": times[1] - times[0],
        "read_work": work[1] - work[0],
        "speed": args.new / (times[2] - times[1]),
        "work": work[2] - work[1],
        "attention": 1e3 * statistics.median(attention) * len(cache.layers),
        "logits": logits,
        "tokens": tokens,
    }


if __name__ == "__main__":
    main()
