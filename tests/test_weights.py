"""Codecs fitted to a model's weights."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tolerances import NORM_EPSILON
from transformers import AutoConfig, AutoModelForCausalLM

from forgeattention import CodecSpec
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.models.weights.fit import STEPS, KeyWeights
from forgeattention.models.weights.hf import key_weights, weight_codecs

SIZES: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NEOX = [*range(32, 64), *range(32)]
SWAPPED = [i ^ 1 for i in range(64)]
# Partner of each channel under RoPE.
PAIRS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "llama": ({}, NEOX),
    "qwen2": ({}, NEOX),
    "qwen3": ({}, NEOX),
    "gemma": ({}, NEOX),
    "phi3": ({"hidden_size": 256}, NEOX),
    "cohere": ({"hidden_size": 256}, SWAPPED),
    "glm": ({"partial_rotary_factor": 0.5}, [*(i ^ 1 for i in range(32)), *range(32, 64)]),
}


def model(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **PAIRS[kind][0], **changes}))
    for name, p in made.named_parameters():
        if "norm" in name:
            p.data += 0.3 * torch.rand_like(p)
        elif "bias" in name:
            p.data += 0.1 * torch.randn_like(p)
    return made.requires_grad_(False)


def known(made: Any, layer: int = 0) -> KeyWeights:
    found = key_weights(made)[layer]
    assert isinstance(found, KeyWeights), found
    return found


def rows(made: Any, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Energies of the query and key rows of layer 0, [heads, 64], by running the norm and the projections."""
    layer = made.model.layers[0]
    width = layer.input_layernorm.weight.shape[0]
    gain = layer.input_layernorm.weight + (1 if kind == "gemma" else 0)
    attention = layer.self_attn
    if kind == "phi3":
        q, k, _ = attention.qkv_proj.weight.split([256, 128, 128])
    else:
        q, k = attention.q_proj.weight, attention.k_proj.weight
    out = []
    for weight, linear in ((q, getattr(attention, "q_proj", None)), (k, None)):
        energy = ((weight * gain) ** 2).reshape(-1, 64, width).sum(-1)
        if linear is not None and linear.bias is not None:
            energy = energy + linear.bias.reshape(-1, 64) ** 2
        out.append(energy.double().numpy())
    if kind == "qwen3":
        for i, norm in enumerate((attention.q_norm, attention.k_norm)):
            out[i] *= 64 / out[i].sum(1, keepdims=True) * norm.weight.double().numpy() ** 2
    return out[0], out[1]


@pytest.mark.parametrize("kind", PAIRS)
def test_energies_and_diagonal(kind: str) -> None:
    made = model(kind)
    found, pairs = known(made), PAIRS[kind][1]
    q, k = rows(made, kind)
    q = q.reshape(2, 2, 64).sum(1)
    q, k = (q + q[:, pairs]) / 2, (k + k[:, pairs]) / 2
    np.testing.assert_allclose(found.query_energy, q, rtol=NORM_EPSILON)
    ratio = (q / q.mean(1, keepdims=True)) / (k / k.mean(1, keepdims=True))
    step = 2 ** (1 / STEPS)
    assert np.abs(np.log(found.diagonal / ratio**0.25)).max() < 0.51 * np.log(step)
    np.testing.assert_array_equal(found.diagonal, found.diagonal[:, pairs])


def test_scaled_channels_give_the_same_pages() -> None:
    """Keys times s with queries over s are the same model: the diagonal takes s out again."""
    made = model("llama")
    codec = known(made).codec(CodecSpec(scales="fp16"))
    scale = 2.0 ** np.random.default_rng(0).integers(-3, 4, 32)
    scale = np.concatenate([scale, scale])
    attention = made.model.layers[0].self_attn
    for linear, s in ((attention.q_proj, 1 / scale), (attention.k_proj, scale)):
        linear.weight.data *= torch.from_numpy(np.tile(s, linear.out_features // 64)[:, None]).float()
    other = model("llama")
    other.load_state_dict(made.state_dict())
    changed = known(other).codec(CodecSpec(scales="fp16"))
    ratio = changed.k_transform.diagonal * scale / codec.k_transform.diagonal  # type: ignore[operator]
    assert np.abs(np.log2(ratio / np.median(ratio, 1, keepdims=True))).max() <= 1.01 / STEPS


def test_unknown_forms_are_named(caplog: pytest.LogCaptureFixture) -> None:
    small = tiny.llama()
    with caplog.at_level(logging.WARNING, "forgeattention"):
        assert weight_codecs(small, CodecSpec(), [0, 1]) == {}
    assert "head_dim 8 is not one of" in caplog.text
    whole = model("llama")
    whole.model.layers[1].self_attn.k_proj.weight.data.zero_()
    assert list(weight_codecs(whole, CodecSpec(), [0, 1])) == [0]
    assert key_weights(whole)[1] == "a projection is zero or not finite"


def test_codecs_are_made_once_and_die_with_the_model() -> None:
    made = model("llama")
    first, second = (weight_codecs(made, CodecSpec(), [0, 1]) for _ in range(2))
    assert first[0] is second[0]
    assert weight_codecs(made, CodecSpec(rotation="planar"), [0]) == {}
    gone = weakref.ref(made)
    del made
    gc.collect()
    assert gone() is None


def test_a_cache_takes_a_model_or_its_config() -> None:
    made = model("llama")
    fitted, plain = ForgeCache(made), ForgeCache(made.config)
    ids = torch.arange(300)[None] % 97
    made.set_attn_implementation("forge")
    for cache in (fitted, plain):
        made(ids, past_key_values=cache)
    for layer in range(2):
        codec = fitted.layers[layer].cache.codec
        assert codec.k_transform.diagonal is not None
        assert codec.shaping is not None
        assert plain.layers[layer].cache.codec.shaping is None


def test_fingerprints_hold_what_readers_need() -> None:
    found = known(model("llama"))
    spec = CodecSpec()
    codec = found.codec(spec)
    other_gram = KeyWeights(found.diagonal, found.query_energy[:, ::-1]).codec(spec)
    other_diagonal = KeyWeights(found.diagonal * 2, found.query_energy).codec(spec)
    assert codec.fingerprint == other_gram.fingerprint == found.codec(CodecSpec(refine=False)).fingerprint
    assert codec.fingerprint != other_diagonal.fingerprint
