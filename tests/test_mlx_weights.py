"""Codecs fitted to mlx-lm models: what is read of the weights is what transformers' form of the model gives."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import mlx.nn as nn  # noqa: E402
from mlx_families import build  # noqa: E402
from mlx_lm.models import cache as stock  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402
from mlx_models import SPEC, greedy, model, tokens  # noqa: E402
from test_weights import PAIRS, known  # noqa: E402
from test_weights import model as torch_model  # noqa: E402

from forgeattention.codec import Codec, CodecSpec  # noqa: E402
from forgeattention.integrations import mlx as forge  # noqa: E402
from forgeattention.models.weights import mlx as mlx_weights  # noqa: E402
from forgeattention.models.weights.fit import KeyWeights  # noqa: E402


def read(made: Any) -> dict[int, KeyWeights | str]:
    return mlx_weights.key_weights(made, forge.full_attention(made))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma", "cohere"])
def test_the_same_as_in_transformers(kind: str, tmp_path: Path) -> None:
    size = {"hidden_size": 256} if "hidden_size" not in PAIRS[kind][0] else {}
    reference = torch_model(kind, **size)
    reference.save_pretrained(tmp_path)
    made, _ = load_model(tmp_path)
    for layer, found in read(made).items():
        want = known(reference, layer)
        assert isinstance(found, KeyWeights), found
        assert (found.diagonal == want.diagonal).all()
        np.testing.assert_allclose(found.query_energy, want.query_energy, rtol=1e-5)


def test_quantised_weights_are_read_as_they_decode() -> None:
    made = model()
    exact = read(made)[0]
    nn.quantize(made, group_size=64, bits=8)
    found = read(made)[0]
    assert isinstance(found, KeyWeights)
    np.testing.assert_allclose(found.query_energy, exact.query_energy, rtol=0.02)


def test_layers_that_cannot_be_read_say_so(caplog: Any) -> None:
    made = build("gpt_neox")  # its queries, keys and values lie side by side by head
    with caplog.at_level(logging.WARNING, "forgeattention"):
        found = read(made)
    assert "Attention has no plain q_proj and k_proj, nor a plain qkv_proj" in str(found[3])
    assert "without the model's weights in some layers" in caplog.text


def test_codecs_are_made_once_and_go_with_the_model() -> None:
    made = model()
    first, again = (forge.make_prompt_cache(made, SPEC) for _ in range(2))
    assert [x.codec for x in first] == [x.codec for x in again]
    assert all(x.codec.shaping is not None for x in first)
    assert forge.make_prompt_cache(made, SPEC, fitted=False)[0].codec is None
    assert forge.make_prompt_cache(made, CodecSpec(rotation="planar"))[0].codec is None
    own = Codec(SPEC, 64, 2)
    assert forge.make_prompt_cache(made, SPEC, codecs={1: own})[1].codec is own
    held = len(mlx_weights._known)
    del made
    gc.collect()
    assert len(mlx_weights._known) == held - 1


@pytest.mark.parametrize("own", [True, False])
def test_saved_caches_keep_their_codecs(own: bool, tmp_path: Path) -> None:
    made, path = model(), str(tmp_path / "cache.safetensors")
    with forge.patched():
        cache = forge.make_prompt_cache(made, SPEC)
        greedy(made, cache, tokens(1, 170)[0], 1)
        if own:
            forge.save_prompt_cache(path, cache, made)
            back = forge.load_prompt_cache(path, made)
            assert [x.cache.codec for x in back] == [x.codec for x in cache]
        else:
            stock.save_prompt_cache(path, cache)
            back = stock.load_prompt_cache(path)
            assert all(x.codec.shaping is None for x in back)
        assert [x.cache.codec.fingerprint for x in back] == [x.codec.fingerprint for x in cache]
        want, logs = greedy(made, cache, [1, 2, 3], 4)
        found, again = greedy(made, back, [1, 2, 3], 4)
    assert (logs == again).all()
    assert found == want
    centred = forge.make_prompt_cache(made, SPEC, codecs={0: Codec(SPEC, 64, 2, k_mu=np.ones(64))})
    with forge.patched():
        greedy(made, centred, tokens(1, 170)[0], 1)
        with pytest.raises(
            ValueError, match="expected codecs of a spec and the model's weights; got another in layer 0"
        ):
            forge.save_prompt_cache(path, centred, made)


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("phi3", [0, 1, 2, 3]),
        ("qwen3_next", [3]),
        ("olmo2", [0, 1, 2, 3]),
        ("gemma4_text", [1]),
        ("mixtral", [0, 1, 2, 3]),
    ],
)
def test_fused_gated_and_shared_layers_are_fitted(kind: str, layers: list[int]) -> None:
    """Fused projections, queries beside a gate, norms over all heads, fewer caches than layers, experts."""
    found = read(build(kind))
    assert list(found) == layers
    assert all(isinstance(x, KeyWeights) for x in found.values()), found


def test_fused_and_gated_projections_are_cut_as_the_model_cuts_them() -> None:
    """The energies are those of the projections' outputs for inputs of each direction, without norms and rotation."""
    for kind, name in (("phi3", "qkv_proj"), ("qwen3_next", "q_proj")):
        made = build(kind)
        number, layer = next(iter(forge.full_attention(made).items()))
        attention, dim = layer.module, layer.k_dim
        rows = mx.eye(made.args.hidden_size)
        out = np.array(getattr(attention, name)(rows[None])[0])  # [in, out]
        heads = layer.q_heads
        if name == "qkv_proj":
            queries = out[:, : heads * dim].reshape(-1, heads, dim)
        else:
            queries = out.reshape(len(rows), heads, 2, dim)[:, :, 0]
        (weight, _), _ = mlx_weights._projections(layer, kind)
        np.testing.assert_allclose(weight.reshape(heads, dim, -1), queries.transpose(1, 2, 0), rtol=1e-5, atol=1e-6)
        assert number in read(made)


def test_lora_weights_are_read_as_they_compute() -> None:
    from mlx_lm.tuner.lora import LoRALinear

    made = model()
    attention = made.layers[0].self_attn
    lora = LoRALinear.from_base(attention.q_proj, r=4)
    lora.lora_b = mx.random.normal(lora.lora_b.shape)
    attention.q_proj = lora
    found = read(made)[0]
    attention.q_proj = lora.fuse()
    want = read(made)[0]
    assert isinstance(found, KeyWeights)
    np.testing.assert_allclose(found.query_energy, want.query_energy, rtol=1e-4)
