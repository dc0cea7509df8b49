"""Real vLLM engines on the CPU: `make test-vllm` runs these in a virtual environment of their own."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "passive",
}
DEFAULTS = {"enforce_eager": True, "dtype": "float32", "max_model_len": 2048, "disable_log_stats": False}
os.environ |= SETTINGS
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))


@pytest.fixture(scope="session")
def smollm2() -> str:
    """SmolLM2-135M-Instruct as a folder of safetensors."""
    from forgeattention import models

    return models.folder("smollm2")


@pytest.fixture(scope="session")
def text() -> str:
    import forgeattention.tools.evaluation

    return (Path(forgeattention.tools.evaluation.__file__).parent / "data" / "genesis.txt").read_text()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Makes a folder with a small random Llama; arguments are those of its config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**changes: Any) -> str:
        options = {
            "vocab_size": 512,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": 0.1,
        }
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("llama")
        LlamaForCausalLM(LlamaConfig(**options | changes)).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture
def engine() -> Iterator[Callable[..., Any]]:
    """Makes vLLM engines: `packed` are our settings, or None for vLLM's own cache."""
    from vllm import LLM

    made = []

    def make(model: str, packed: dict[str, Any] | None, **options: Any) -> Any:
        if packed is not None:
            options = {"attention_backend": "CUSTOM", "additional_config": {"forgeattention": packed}} | options
        made.append(LLM(model=model, **DEFAULTS | options))
        return made[-1]

    yield make
    for llm in made:
        llm.llm_engine.engine_core.shutdown()
    made.clear()
    gc.collect()
