"""Kinds of models: windows, sinks, shared keys and values, widths of heads, adapters; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.tolerances import VLLM_RANDOM_SAME_TOP
from tests.vllm_engine.compare import divergence, logprobs

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


SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.08,
}


def gpt_oss(folder: str) -> None:
    """Sinks in every layer, experts, every second layer with a sliding window."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    kinds = ["sliding_attention", "full_attention"] * 2
    own: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128}
    model = GptOssForCausalLM(GptOssConfig(**SMALL, **own, num_hidden_layers=4, layer_types=kinds))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_()
    model.save_pretrained(folder)


def gemma3n(folder: str) -> None:
    """The last two layers read the keys and values of the layers before: one of a window, one of full attention."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    kinds = ["sliding_attention", "full_attention"] * 3
    own: dict[str, Any] = {
        "vocab_size_per_layer_input": 512,
        "hidden_size_per_layer_input": 32,
        "sliding_window": 128,
        "num_kv_shared_layers": 2,
        "altup_num_inputs": 2,
        "laurel_rank": 16,
        "activation_sparsity_pattern": [0.0] * 6,
    }
    Gemma3nForCausalLM(Gemma3nTextConfig(**SMALL, **own, num_hidden_layers=6, layer_types=kinds)).save_pretrained(
        folder
    )


def check_close(own: list[dict[int, float]], packed: list[dict[int, float]]) -> None:
    kl, same = divergence(own, packed)
    print(f"KL {kl:.4f}, same top token {same:.1%}")
    assert same > VLLM_RANDOM_SAME_TOP


@pytest.mark.parametrize(
    ("make", "packed", "exact"),
    [(gpt_oss, ["1", "3"], ["1", "3"]), (gemma3n, ["1", "3", "5"], ["1", "3"])],
    ids=["gpt_oss", "gemma3n"],
)
def test_sinks_experts_and_shared_keys(
    make: Callable[[str], None], packed: list[str], exact: list[str], tmp_path: Any, engine: Callable[..., Any]
) -> None:
    """With all tokens exact the answers are vLLM's own; packed, predictions stay close."""
    import torch

    torch.manual_seed(0)
    make(str(tmp_path))
    prompts = [{"prompt_token_ids": [(7 * i + 13 * j * j) % 500 + 3 for j in range(500 + 60 * i)]} for i in range(4)]
    options = {"skip_tokenizer_init": True, "max_model_len": 1024, "max_num_batched_tokens": 256}
    said, likely = [], []
    for settings in (None, {"window": 1024}, {"preset": "fidelity"}):
        llm = engine(str(tmp_path), settings, **options)
        outs = llm.generate(prompts, GREEDY, use_tqdm=False)
        said.append([out.outputs[0].token_ids for out in outs])
        likely.append(logprobs(llm, prompts[3]["prompt_token_ids"]))
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    kinds = {n: x.get_attn_backend().__name__ for n, x in layers.items() if hasattr(x, "get_attn_backend")}
    for wanted, kind in ((packed, "PackedBackend"), (exact, "ExactBackend")):
        assert sorted(name.split(".")[2] for name, each in kinds.items() if each == kind) == wanted
    assert said[1] == said[0]
    check_close(likely[0], likely[2])


@pytest.mark.parametrize("head_dim", [96, 128, 256])
def test_widths_of_heads(head_dim: int, llama: Callable[..., str], engine: Callable[..., Any]) -> None:
    model = llama(head_dim=head_dim)
    ids = [(7 + 13 * j * j) % 500 + 3 for j in range(700)]
    options = {"skip_tokenizer_init": True, "max_model_len": 1024, "max_num_batched_tokens": 256}
    settings: tuple[dict[str, Any] | None, ...] = (None, {"window": 1024}, {"preset": "fidelity"})
    own, exact, packed = (logprobs(engine(model, each, **options), ids) for each in settings)
    assert divergence(own, exact) == pytest.approx((0, 1), abs=1e-6)
    check_close(own, packed)


def test_latent_attention_is_refused(tmp_path: Any, engine: Callable[..., Any]) -> None:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    shape = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    own: dict[str, Any] = {"kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16}
    own |= {"v_head_dim": 32, "n_routed_experts": 4, "first_k_dense_replace": 2, "num_hidden_layers": 2}
    DeepseekV2ForCausalLM(DeepseekV2Config(**shape, **own, num_key_value_heads=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected layers that the packed cache supports; got MLA not supported"):
        engine(str(tmp_path), {}, skip_tokenizer_init=True)


def test_an_adapter_changes_answers_as_it_does_with_vllm_s_cache(
    llama: Callable[..., str], engine: Callable[..., Any], tmp_path: Path
) -> None:
    """One request with a LoRA adapter beside one without; all tokens exact, so that answers are equal."""
    import torch
    from safetensors.torch import save_file
    from vllm.lora.request import LoRARequest

    torch.manual_seed(1)
    weights = {}
    for layer in range(2):
        for name, rows in (("q_proj", 256), ("k_proj", 128), ("v_proj", 128)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = 0.3 * torch.randn(8, 256)
            weights[f"{at}.lora_B.weight"] = 0.3 * torch.randn(rows, 8)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    prompt = {"prompt_token_ids": [(7 + 13 * j * j) % 500 + 3 for j in range(400)]}
    options = {"skip_tokenizer_init": True, "max_model_len": 1024, "max_num_batched_tokens": 256, "enable_lora": True}
    model, said = llama(), []
    for settings in (None, {"window": 1024}):
        llm = engine(model, settings, **options)
        adapters = [None, LoRARequest("random", 1, str(tmp_path))]
        outs = llm.generate([prompt, prompt], GREEDY, use_tqdm=False, lora_request=adapters)
        said.append([out.outputs[0].token_ids for out in outs])
    assert said[0][0] != said[0][1]
    assert said[1] == said[0]
