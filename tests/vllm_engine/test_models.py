"""Kinds of models whose layers are not all of full attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from vllm import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)


@pytest.fixture
def gemma3(tmp_path: Any) -> str:
    """A folder with a small random Gemma 3: four layers with a sliding window of 128 tokens, two of full attention."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        sliding_window=128,
        initializer_range=0.08,
        layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2,
    )
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    return str(tmp_path)


def test_sliding_windows_stay_with_vllm_and_full_attention_is_packed(gemma3: str, engine: Callable[..., Any]) -> None:
    prompts = [{"prompt_token_ids": [(7 * i + 13 * j * j) % 500 + 3 for j in range(500 + 60 * i)]} for i in range(4)]
    options = {"skip_tokenizer_init": True, "max_model_len": 1024, "max_num_batched_tokens": 256}
    said = []
    for packed in (None, {"preset": "fidelity"}):
        llm = engine(gemma3, packed, **options)
        for _ in range(2):  # the second time from the prefix cache
            outs = llm.generate(prompts, GREEDY, use_tqdm=False)
            said.append([out.outputs[0].token_ids for out in outs])
        assert [m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits"] > [1500]
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    kinds = {name: layer.get_attn_backend().__name__ for name, layer in layers.items()}
    assert sorted(name.split(".")[2] for name, kind in kinds.items() if kind == "PackedBackend") == ["2", "5"]
    assert sum(kind == "CPUAttentionBackend" for kind in kinds.values()) == 4
    assert said[1:] == said[:1] * 3
