"""Batched answers of exact and simulated caches equal those of the same caches one by one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import batch_decode
import candidates
import fidelity_measure

KIVI, AFFINE = "KIVI 2-bit, groups of 32", "TurboQuant 3-bit (vLLM), 2 + 2 layers exact"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(head_dim=64, num_hidden_layers=5, hidden_size=128, initializer_range=0.15).float()


@pytest.fixture(scope="module")
def caches(model: Any) -> dict[str, candidates.Candidate]:
    made = candidates.candidates(model, "field", sinks=4, window=64)
    return {c.name: c for c in made}


def prompts(*lengths: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (n,), generator=draw) for n in lengths]


@pytest.mark.parametrize("name", ["exact", KIVI, AFFINE, "KVarN K4V2, tiles of 128", "preset balanced"])
@pytest.mark.parametrize("shared", [0, 300])
def test_answers_are_those_of_single_prompts(
    model: Any, caches: dict[str, candidates.Candidate], name: str, shared: int
) -> None:
    asked, candidate = prompts(40, 75, 20), caches[name]
    front = prompts(300)[0][:shared]
    got = batch_decode.answers(model, asked, candidate, 90, shared=front if shared else None, stop=False)
    for prompt, answer in zip(asked, got):
        ids = torch.cat([front, prompt])[None]
        alone = batch_decode.answers(model, [prompt], candidate, 90, shared=front if shared else None, stop=False)[0]
        assert answer == alone
        if not shared:
            plain = fidelity_measure.greedy(model, ids, candidate, 90)[0].tolist()
            end = plain.index(256) if 256 in plain else 90
            assert answer[:end] == plain[:end]


def test_simulated_caches_answer_otherwise_than_the_exact_one(model: Any, caches: dict[str, Any]) -> None:
    asked = prompts(150, 200)
    exact, coded = (batch_decode.answers(model, asked, caches[n], 80, stop=False) for n in ("exact", KIVI))
    assert exact != coded


def test_answers_end_where_they_are_told(model: Any, caches: dict[str, Any]) -> None:
    asked = prompts(30, 50)
    got = batch_decode.answers(model, asked, caches["exact"], 64, stop=False, ended=lambda text: len(text) >= 16)
    assert [len(answer) for answer in got] == [16, 16]
