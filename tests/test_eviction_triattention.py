"""Scores: the folded query against the paper's formula, and the rotations of real configs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EXACT, ROPE_FLOAT32
from transformers import CohereConfig, Gemma3TextConfig, LlamaConfig, Qwen3_5TextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from forgeattention.eviction import Centres, Rope, load_centres, rope_of, save_centres
from forgeattention.eviction.triattention import OFFSETS, join_heads
from forgeattention.reference import triattention_score


def rotate(rope: Rope, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Vectors [n, head_dim] after RoPE."""
    turned = rope.channels(rope.pairs(x) * rope.turn(positions), x.shape[1])
    kept = np.ones(x.shape[1], bool)
    kept[: rope.n_rot] = False
    return np.where(kept, x, turned)


@settings(max_examples=40, deadline=None)
@given(
    half=st.integers(1, 16), rest=st.integers(0, 16), interleaved=st.booleans(), heads=st.integers(1, 3),
    position=st.integers(0, 5000), seed=st.integers(0, 999),
)  # fmt: skip
def test_folded_query_is_the_papers_score(half, rest, interleaved, heads, position, seed):
    rng = np.random.default_rng(seed)
    rope = Rope(10000.0 ** -(np.arange(half) / half), interleaved)
    dim = 2 * half + rest
    q = rng.standard_normal((heads, 20, dim)) + rng.standard_normal((heads, 1, dim))
    at = np.sort(rng.choice(6000, 20, replace=False))
    centres = Centres(rope, heads)
    for part in (slice(0, 3), slice(3, 20)):
        centres.add(np.stack([rotate(rope, x[part], at[part]) for x in q]), at[part])
    k, key_at = rng.standard_normal((5, dim)), rng.integers(0, 5000, 5)
    folded, weights = centres.folded(position, dim), centres.norm_weights()
    cached = rotate(rope, k, key_at)
    for h in range(heads):
        got = cached @ folded[h] + np.abs(rope.pairs(cached)) @ weights[h]
        want = [
            triattention_score(rope.pairs(q[h]), rope.pairs(key), p, position, rope.frequencies, OFFSETS)
            for key, p in zip(k, key_at)
        ]
        np.testing.assert_allclose(got, want, rtol=0, atol=EXACT * max(1.0, np.abs(want).max()))


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "parameters",
    [LLAMA3, YARN, {**YARN, "truncate": False, "beta_fast": 20.0, "partial_rotary_factor": 0.5},
     {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}],
    ids=["llama3", "yarn", "yarn, part of the channels", "linear"],
)  # fmt: skip
def test_scaled_frequencies_are_those_of_transformers(parameters):
    config = LlamaConfig(head_dim=128, rope_parameters=parameters)
    want, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    np.testing.assert_allclose(rope_of(config).frequencies, want.double().numpy(), rtol=ROPE_FLOAT32)


def test_partial_nested_and_interleaved_configs():
    qwen = rope_of(Qwen3_5TextConfig(head_dim=256))
    assert (qwen.n_rot, qwen.interleaved) == (64, False)
    assert rope_of(CohereConfig()).interleaved
    gemma = Gemma3TextConfig()
    np.testing.assert_allclose(
        rope_of(gemma).frequencies,
        rope_of(LlamaConfig(head_dim=256, rope_parameters=gemma.rope_parameters["full_attention"])).frequencies,
    )


def test_mlx_configs_are_read():
    scaling = {"type": "linear", "factor": 2.0}
    rope = rope_of(SimpleNamespace(rope_theta=1e4, rope_traditional=True, head_dim=64, rope_scaling=scaling))
    assert rope.interleaved
    np.testing.assert_allclose(rope.frequencies, 0.5 * 1e4 ** (-np.arange(0, 64, 2) / 64))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_are_refused(kind):
    config = LlamaConfig(head_dim=64)
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4}
    with pytest.raises(ValueError, match=rf"\[rope\] expected a rope_type .* got '{kind}'"):
        rope_of(config)


def test_models_rotate_as_the_rope_says():
    """The pairs that a model's own rotation turns are those of `Rope`."""
    from transformers.models.cohere.modeling_cohere import CohereRotaryEmbedding, apply_rotary_pos_emb
    from transformers.models.llama import modeling_llama as llama

    x = torch.randn(1, 1, 7, 64, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([[0, 1, 5, 90, 91, 400, 2000]])
    for config, embed, apply in (
        (LlamaConfig(head_dim=64), llama.LlamaRotaryEmbedding, llama.apply_rotary_pos_emb),
        (CohereConfig(hidden_size=256, num_attention_heads=4), CohereRotaryEmbedding, apply_rotary_pos_emb),
    ):
        turned = apply(x, x, *embed(config)(x, at))[0][0, 0].numpy()
        want = rotate(rope_of(config), x[0, 0].double().numpy(), at[0].numpy())
        np.testing.assert_allclose(turned, want, atol=1000 * ROPE_FLOAT32)


def test_centres_are_saved_whole(tmp_path):
    rope = Rope(np.array([1.0, 0.1]))
    centres = Centres(rope, 3)
    centres.add(np.random.default_rng(0).standard_normal((3, 9, 6)), np.arange(9))
    path = tmp_path / "centres.safetensors"
    save_centres(path, {4: centres})
    ((number, found),) = load_centres(path, rope).items()
    assert (number, found.count) == (4, 9)
    np.testing.assert_array_equal(found.folded(77, 6), centres.folded(77, 6))
    np.testing.assert_array_equal(found.norm_weights(), centres.norm_weights())
    with pytest.raises(ValueError, match=r"\[centres\] expected 1 frequencies per head; got 2"):
        load_centres(path, Rope(np.array([1.0])))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"\[centres\] expected a complete safetensors file"):
        load_centres(path, rope)


def test_heads_are_joined_by_what_each_wants_most():
    scores = np.array([[0.0, 0.0, 9.0, 0.0], [100.0, 300.0, 100.0, 100.0], [5.0, 5.0, 5.0, 5.0]])
    joined = join_heads(scores)
    assert joined[1:3] == pytest.approx(3**0.5)
    assert joined[0] == joined[3] < 0.01
