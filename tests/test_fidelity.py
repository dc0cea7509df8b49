"""Canaries: models whose keys break lesser caches must cost the default hardly more than the plain model does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import CANARY, HEAD_256, SINK_LOGITS

from forgeattention import CodecSpec, models
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.tools.evaluation import kl, texts

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import canaries

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
@pytest.mark.parametrize("name", canaries.CANARIES[::2] + canaries.CANARIES[-1:])
def test_keys_made_hard(smollm2: tuple[Any, torch.Tensor], usual: float, name: str) -> None:
    model, ids = smollm2
    other = canaries.make(name, model)
    found = divergence(other, ids, SPEC)
    lesser = divergence(other, ids, PLAIN, fitted=False)
    assert found < CANARY * usual
    assert lesser > 10 * usual


@pytest.mark.parametrize("sink", [0.0, 10.0])
def test_head_dim_256_and_attention_sinks(sink: float) -> None:
    model, ids = canaries.random_llama(sink), canaries.random_tokens(600)[None]
    assert divergence(model, ids, SPEC) < HEAD_256
    assert divergence(model, ids, CodecSpec(window=4096)) < HEAD_256 / 1000


def test_learned_sink_logits() -> None:
    model, ids = canaries.random_gpt_oss(), canaries.random_tokens(600)[None]
    assert divergence(model, ids, SPEC) < SINK_LOGITS
    assert divergence(model, ids, CodecSpec(window=4096)) < SINK_LOGITS / 1000
