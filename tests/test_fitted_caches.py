"""Caches fitted by a text: what is captured, that rotations are such, and that all of them can be read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import candidates
import fidelity_measure
import fitted_caches


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(head_dim=64, num_hidden_layers=2, hidden_size=128, initializer_range=0.15).float()


@pytest.fixture(scope="module")
def seen(model: Any) -> dict[int, fitted_caches.Seen]:
    return fitted_caches.capture(model, fitted_caches.text(tiny.tokenizer(), 600))


def test_grams_are_those_of_the_queries(model: Any, seen: dict[int, fitted_caches.Seen]) -> None:
    ids = fitted_caches.text(tiny.tokenizer(), 600)
    layer = model.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(model.model.embed_tokens(ids))
        q = layer.self_attn.q_proj(x).view(1, 600, 4, 64).transpose(1, 2)
        cos, sin = model.model.rotary_emb(x, torch.arange(600)[None])
        half = torch.cat([-q[..., 32:], q[..., :32]], -1)
        q = (q * cos + half * sin)[0].double()
    want = torch.stack([(x := q[2 * h : 2 * h + 2].reshape(-1, 64)).T @ x / len(x) for h in range(2)])
    torch.testing.assert_close(seen[0].queries, want, rtol=1e-4, atol=1e-5)


def test_rotations_even_out_what_queries_see(seen: dict[int, fitted_caches.Seen]) -> None:
    gram = seen[1].queries[0]
    turn = fitted_caches.rotation(gram)
    torch.testing.assert_close(turn @ turn.T, torch.eye(64, dtype=torch.float64))
    channels = (turn.T @ gram @ turn).diagonal()
    assert float(channels.max() / channels.min()) < 1.001
    assert float(gram.diagonal().max() / gram.diagonal().min()) > 1.2


def test_int2_has_four_levels_and_clips() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    got = fitted_caches.int2(x, 0.96)
    assert all(len(row.unique()) <= 4 for row in got)
    assert (got.abs().amax(-1) < x.abs().amax(-1)).all()
    assert float((got - x).square().mean()) < float((fitted_caches.int2(x, 1.0) - x).square().mean()) * 1.2


def test_every_fitted_cache_is_read(model: Any) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (1, 520))
    made = fitted_caches.candidates(model, tiny.tokenizer())
    found = fidelity_measure.compare(model, ids, [candidates.EXACT, *made])
    assert len(found) == 9
    assert all(0 < row["kl"] < 1 for name, row in found.items() if name != "exact")
    assert made[-1].effective_bits <= 2.25
    assert isinstance(candidates.EXACT.make(model), DynamicCache)
