"""Canaries: models whose keys break lesser caches must cost the default hardly more than the plain model does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import CANARY, HEAD_256
from transformers import LlamaConfig, LlamaForCausalLM

from forgeattention import CodecSpec, models
from forgeattention.evaluation import kl, texts
from forgeattention.integrations.hf import ForgeCache

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from fidelity import CANARIES, canary

SPEC = CodecSpec()
PLAIN = CodecSpec(key_mean=False, k_code="scalar", refine=False)


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, torch.Tensor]:
    model, tokenizer = models.load("smollm2")
    ids = tokenizer(texts.read("licences"), add_special_tokens=False, return_tensors="pt")["input_ids"][:, :640]
    return model, ids


def divergence(model: Any, ids: torch.Tensor, spec: CodecSpec, fitted: bool = True) -> float:
    source = model if fitted else model.config
    return kl.compare(model, ids, lambda: ForgeCache(source, spec), implementation="forge").kl


@pytest.fixture(scope="module")
def usual(smollm2: tuple[Any, torch.Tensor]) -> float:
    return divergence(*smollm2, SPEC)


@pytest.mark.slow
@pytest.mark.parametrize("name", CANARIES)
def test_keys_made_hard(smollm2: tuple[Any, torch.Tensor], usual: float, name: str) -> None:
    model, ids = smollm2
    with canary(model, *CANARIES[name]) as other:
        found = divergence(other, ids, SPEC)
        lesser = divergence(other, ids, PLAIN, fitted=False)
    assert found < CANARY * usual
    assert lesser > 10 * usual


@pytest.mark.parametrize("sink", [0.0, 10.0])
def test_head_dim_256_and_attention_sinks(sink: float) -> None:
    """A model of random weights, whose queries may all like the first token by five nats."""
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
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 600)))
    ids[0, 0] = 256
    assert divergence(model, ids, SPEC) < HEAD_256
    assert divergence(model, ids, CodecSpec(window=4096)) < HEAD_256 / 1000
