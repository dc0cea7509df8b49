"""Engines of vLLM that the scripts beside this one compare, by name; and what they are asked."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

ENGINES: dict[str, dict[str, Any]] = {
    "own": {},
    "own-fp8": {"kv_cache_dtype": "fp8"},
    "own-turboquant_3bit_nc": {"kv_cache_dtype": "turboquant_3bit_nc"},
    "own-turboquant_4bit_nc": {"kv_cache_dtype": "turboquant_4bit_nc"},
    **{
        f"packed-{preset}": {
            "attention_backend": "CUSTOM",
            "block_size": 64,
            "additional_config": {"forgeattention": {"preset": preset}},
        }
        for preset in ("fidelity", "balanced", "small")
    },
}
GRAPHS: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "decode": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "piecewise": {"compilation_config": {"mode": 3, "cudagraph_mode": "PIECEWISE"}},
    "compiled": {"compilation_config": {"mode": 3, "cudagraph_mode": "FULL_AND_PIECEWISE"}},
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
    "head_dim": 128,
}
SHAPES = {
    "llama-8b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": LLAMA
    | {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "initializer_range": 0.1,
    },
}
"""Configs of models with random weights."""
CPU = {
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "GLOO_SOCKET_IFNAME": "lo",
}
"""Environment of an engine on a CPU."""


def add_arguments(parser: Any) -> None:
    """What says which engine runs what; `options` reads it."""
    parser.add_argument("--model", default="", help="folder of a model")
    parser.add_argument("--shape", default="", choices=["", *SHAPES], help="random weights of this shape")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a trial, eager and float32")
    parser.add_argument("--engine", default="packed-balanced", choices=list(ENGINES))
    parser.add_argument("--graphs", default="decode", choices=list(GRAPHS))
    parser.add_argument("--memory", type=float, default=0.25, help="share of the GPU's memory")
    parser.add_argument("--length", type=int, default=32768, help="max_model_len")
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel, in processes of their own")


def named(a: Any) -> dict[str, Any]:
    """What a record says of its engine."""
    # A converted folder's name goes on behind the model's.
    model = a.shape or re.sub("-[0-9a-f]{16}-.*", "", Path(a.model).name)
    graphs = "eager" if a.device == "cpu" else a.graphs
    return {"op": "vllm", "engine": a.engine, "graphs": graphs, "memory": a.memory, "model": model}


def make(a: Any, **changes: Any) -> Any:
    """The engine, in this process.

    Args:
        a: as `add_arguments` reads it.
        changes: more arguments of vllm.LLM, which win; `additional_config` is added to that of the engine.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0" if a.ranks == 1 else "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if a.device == "cpu":
        for name, value in CPU.items():
            os.environ.setdefault(name, value)
    from vllm import LLM

    options: dict[str, Any] = {
        "model": a.model,
        "dtype": "float32" if a.device == "cpu" else "bfloat16",
        "seed": 0,
        "enable_prefix_caching": False,
        "max_model_len": a.length,
        "tensor_parallel_size": a.ranks,
        **ENGINES[a.engine],
        **GRAPHS["eager" if a.device == "cpu" else a.graphs],
    }
    if a.device == "cuda":
        options["gpu_memory_utilization"] = a.memory
    if a.shape:
        options["model"] = tempfile.mkdtemp()
        Path(options["model"], "config.json").write_text(json.dumps(SHAPES[a.shape]))
        options |= {"load_format": "dummy", "skip_tokenizer_init": True}
    settings = changes.pop("settings", {})
    if settings and a.engine.startswith("packed"):
        own = options["additional_config"]["forgeattention"]
        options["additional_config"] = {"forgeattention": own | settings}
    return LLM(**options | changes)


def environment_record() -> dict[str, Any]:
    """The `env` record of this process."""
    import torch

    from forgeattention.util.environment import environment

    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"op": "env", **environment(), **gpu}


def text_ids(a: Any, llm: Any) -> list[int]:
    """Token ids of a long text; for random weights, numbers that repeat late."""
    if a.shape:
        most = SHAPES[a.shape]["vocab_size"] - 100
        return [(7919 * i + i * i) % most + 100 for i in range(200000)]
    text = (Path(__file__).parents[1] / "src/forgeattention/tools/evaluation/data/genesis.txt").read_text()
    return llm.get_tokenizer()(text)["input_ids"]


def prompts_of(ids: list[int], count: int, length: int) -> list[list[int]]:
    """So many prompts of one length, of other text each."""
    many = ids * (2 + (37 * count + length) // len(ids))
    return [many[37 * i : 37 * i + length] for i in range(count)]
