"""vLLM with packed and with its own cache: tokens/s and time to first token by clients, sessions that fit.

    .venv-vllm/bin/python -m benchmarks.serving_vllm --output benchmarks/results/serving-cpu-DATE.json

Each client sends a prompt of other text, so that nothing is shared, and reads a stream. Both servers stay up and take
turns, so that a noisy machine is equally unkind to them; name a number of clients twice to measure it twice.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil

from forgeattention import models
from forgeattention.tools.evaluation import texts
from forgeattention.util.environment import environment
from forgeattention.util.files import write_json
from tests.server_process import Server
from tests.vllm_engine.conftest import SETTINGS


def sessions(folder: str, ids: list[int], packed: bool, dtype: str) -> dict[str, Any]:
    """How many sequences such as this one the pool holds: its blocks over those that one holds when it decodes."""
    from vllm import LLM, SamplingParams

    ours = {"attention_backend": "CUSTOM", "additional_config": {"forgeattention": {}}} if packed else {}
    llm = LLM(model=folder, dtype=dtype, enforce_eager=True, max_model_len=len(ids) + 64, **ours)
    engine = llm.llm_engine
    engine.add_request("one", {"prompt_token_ids": ids}, SamplingParams(max_tokens=8, ignore_eos=True))
    done = 0
    while done < 3:
        done = sum(len(output.outputs[0].token_ids) for output in engine.step())
    manager = engine.engine_core.engine_core.scheduler.kv_cache_manager
    groups = manager.get_blocks(next(iter(manager.coordinator.single_type_managers[0].req_to_blocks))).blocks
    held = [sum(not block.is_null for block in blocks) for blocks in groups]
    pool, size = manager.block_pool.num_gpu_blocks, manager.coordinator.single_type_managers[0].block_size
    engine.engine_core.shutdown()
    return {
        "op": "sessions",
        "packed": packed,
        "blocks": pool,
        "tokens_per_block": size,
        "pool_tokens": pool * size,
        "blocks_held": held,
        "sessions": (pool - 1) // sum(held),
    }


def steady(requests: int) -> dict[str, Any]:
    """Memory of an engine over many short requests, of a random Llama of one layer: resident bytes at ten moments."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from vllm import LLM, SamplingParams

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 128}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=1, **sizes)).save_pretrained(folder)
        options = {"attention_backend": "CUSTOM", "additional_config": {"forgeattention": {"fit": False}}}
        limits = {"max_model_len": 1024, "max_num_seqs": 64, "num_gpu_blocks_override": 4000}
        llm = LLM(model=folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, **limits, **options)
    random, held = np.random.default_rng(0), []
    ask = SamplingParams(max_tokens=3, ignore_eos=True, detokenize=False)
    for _ in range(10):
        prompts = [random.integers(3, 500, random.integers(60, 200)).tolist() for _ in range(requests // 10)]
        llm.generate([{"prompt_token_ids": p} for p in prompts], ask, use_tqdm=False)
        held.append(psutil.Process().memory_info().rss)
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    llm.llm_engine.engine_core.shutdown()
    return {"op": "steady", "requests": requests, "resident_bytes": held, "blocks_in_use": 3999 - free}


def client(server: Server, ids: list[int], tokens: int, out: list[dict[str, float]]) -> None:
    api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=3600, max_retries=0)
    start, times = time.perf_counter(), []
    options: Any = {"temperature": 0, "stream": True, "extra_body": {"ignore_eos": True}}
    for _ in api.completions.create(model="smollm2", prompt=ids, max_tokens=tokens, **options):
        times.append(time.perf_counter())
    out.append({"first": times[0] - start, "last": times[-1] - start})


def load(server: Server, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """All prompts at once, one client each."""
    out: list[dict[str, float]] = []
    threads = [threading.Thread(target=client, args=(server, p, tokens, out)) for p in prompts]
    before, start = server.metric("vllm:num_preemptions_total"), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if len(out) != len(prompts):
        raise RuntimeError(f"{len(prompts) - len(out)} clients failed; see {server.log}")
    return {
        "clients": len(prompts),
        "seconds": round(seconds, 2),
        "output_tokens_per_second": round(len(prompts) * tokens / seconds, 2),
        "all_tokens_per_second": round(sum(len(p) + tokens for p in prompts) / seconds, 1),
        "seconds_to_first_token": round(statistics.median(x["first"] for x in out), 2),
        "seconds_per_later_token": round(
            statistics.median((x["last"] - x["first"]) / max(tokens - 1, 1) for x in out), 4
        ),
        "preemptions": server.metric("vllm:num_preemptions_total") - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 1, 1, 4, 4, 16])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--memory", type=int, default=1, help="GiB of KV cache")
    parser.add_argument("--requests", type=int, help="measure only memory over so many short requests")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ |= SETTINGS | {"VLLM_CPU_KVCACHE_SPACE": str(args.memory)}

    from transformers import AutoTokenizer

    folder = models.folder("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [i for name in ("genesis", "licences") for i in tokenizer(texts.read(name)).input_ids]
    arguments = ["--dtype", args.dtype, "--enforce-eager", "--max-model-len", str(args.prompt + args.tokens + 64)]
    env = {**environment(), "threads": os.environ.get("OMP_NUM_THREADS"), "load": os.getloadavg()}
    about = {"model": "smollm2", "dtype": args.dtype, "prompt": args.prompt, "tokens": args.tokens, "gib": args.memory}
    records: list[dict[str, Any]] = [{"op": "env", "env": {**env, **about}}]
    if args.requests:
        records.append(steady(args.requests))
        print(records[-1], flush=True)
        if args.output:
            write_json(args.output, records)
        return
    for packed in (True, False):
        records.append(sessions(folder, ids[: args.prompt], packed, args.dtype))
        print(records[-1], flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        servers: dict[bool, Server] = {}
        try:
            for packed, name in ((True, "smollm2"), (False, folder)):
                servers[packed] = Server(name, Path(scratch) / f"log-{packed}", arguments, packed).wait()
                load(servers[packed], [ids[-300:]], 4)
            for i, count in enumerate(args.clients):
                prompts = [ids[1000 * (i * 16 + j) % (len(ids) - args.prompt) :][: args.prompt] for j in range(count)]
                for packed in (True, False):
                    records.append({"op": "serve", "packed": packed, **load(servers[packed], prompts, args.tokens)})
                    print(records[-1], flush=True)
        finally:
            for server in servers.values():
                server.stop()
    records[0]["env"]["load"] += os.getloadavg()
    if args.output:
        write_json(args.output, records)


if __name__ == "__main__":
    main()
