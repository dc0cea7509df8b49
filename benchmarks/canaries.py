"""Models whose keys break lesser caches."""

from __future__ import annotations

import copy
from typing import Any

import torch

# Norm of the bias of every KV head's keys in three layers; Qwen2.5's are 605 to 921 in its first and last layer.
BIASES = (100.0, 300.0, 900.0)
SCALE = 30.0
CANARIES = (*(f"key bias of norm {norm:g}" for norm in BIASES), f"key channels x {SCALE:g}")
RANDOM = ("random weights, head_dim 256", "random weights, attention sink", "random weights, sink logits")


def make(name: str, model: Any) -> Any:
    """The canary `name`: a changed copy of a Llama-like `model`, or a small one of random weights.

    Raises:
        ValueError: an unknown name.
    """
    if name in RANDOM[:2]:
        return random_llama(10.0 if name == RANDOM[1] else 0.0).to(model.device)
    if name == RANDOM[2]:
        return random_gpt_oss().to(model.device)
    if name == CANARIES[-1]:
        return scaled(model)
    if name in CANARIES:
        return biased(model, float(name.rpartition(" ")[2]))
    raise ValueError(f"[canaries] expected one of {CANARIES + RANDOM}; got {name!r}")


def biased(model: Any, norm: float) -> Any:
    """A copy with a bias of this norm on the keys of the two slowest pairs of RoPE in the first, middle and last layer,
    like the key biases of Qwen2.5 (llama.cpp issue 21385)."""
    made = copy.deepcopy(model)
    layers = made.model.layers
    half = layers[0].self_attn.head_dim // 2
    for i in (0, len(layers) // 2, len(layers) - 1):
        k = layers[i].self_attn.k_proj
        bias = torch.zeros(k.out_features // (2 * half), 2 * half, device=k.weight.device, dtype=k.weight.dtype)
        bias[:, [half - 1, half - 2, 2 * half - 1, 2 * half - 2]] = norm / 2
        k.bias = torch.nn.Parameter(bias.reshape(-1), requires_grad=False)
    return made


def scaled(model: Any, factor: float = SCALE) -> Any:
    """A copy with the keys of two pairs of channels times `factor` and their queries over it, which changes nothing in
    exact arithmetic."""
    made = copy.deepcopy(model)
    half = made.model.layers[0].self_attn.head_dim // 2
    for layer in made.model.layers:
        for linear, by in ((layer.self_attn.q_proj, 1 / factor), (layer.self_attn.k_proj, factor)):
            linear.weight.data.view(-1, 2 * half, linear.in_features)[:, [5, 20, 5 + half, 20 + half]] *= by
    return made


def random_llama(sink: float = 0.0) -> Any:
    """Two layers of random weights with head_dim 256, whose queries may all like the first token, number 256, by
    `sink` / 2 nats."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=256, initializer_range=0.12, bos_token_id=None, eos_token_id=256,
        attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    first = torch.sign(torch.randn(64))
    model.model.embed_tokens.weight.data[256] = first
    for layer in model.model.layers:
        q, k = layer.self_attn.q_proj, layer.self_attn.k_proj
        for channel in (127, 255):  # the slowest pair of RoPE
            q.bias.data.view(2, 256)[:, channel] = 4
            k.weight.data[channel] += sink / 64 * first
    return model


def random_gpt_oss() -> Any:
    """Two layers of random weights of gpt-oss's kind: learned sink logits, every other layer with a sliding window."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=257, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.12, num_local_experts=2, num_experts_per_tok=1,
        sliding_window=128, bos_token_id=None, eos_token_id=256, pad_token_id=None,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = GptOssForCausalLM(config).eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(2.0)
    return model


def random_tokens(count: int, seed: int = 0) -> torch.Tensor:
    """Tokens for the small models, int64 [count]; the first is the one that queries may like."""
    ids = torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed))
    ids[0] = 256
    return ids
