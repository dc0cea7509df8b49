"""Eviction in mlx-lm's prompt caches, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models.cache import trim_prompt_cache  # noqa: E402
from mlx_models import SPEC, greedy, model, tokens  # noqa: E402
from tolerances import MLX_MODEL  # noqa: E402

from forgeattention.codec import PAGE  # noqa: E402
from forgeattention.eviction import V3, Eviction, Recency  # noqa: E402
from forgeattention.integrations import mlx as forge  # noqa: E402

LENGTH, NEW, CHUNK = 1000, 20, 96


@pytest.fixture(autouse=True)
def seam() -> Any:
    with forge.patched():
        yield


def made(llm: Any, eviction: Eviction | None) -> list[Any]:
    return forge.make_prompt_cache(llm, SPEC, fitted=False, eviction=eviction)


def read(llm: Any, cache: list[Any], prompt: list[int]) -> None:
    for at in range(0, len(prompt), CHUNK):
        mx.eval(llm(mx.array([prompt[at : at + CHUNK]]), cache=cache))


def held(layer: Any) -> int:
    return int(layer.cache.packed_lengths[0] + layer.cache.exact_lengths[0])


@pytest.mark.parametrize("on_evict", ["drop", "host"])
def test_rounds_happen_and_positions_stay_right(on_evict: str) -> None:
    llm, prompt = model(), tokens(1, LENGTH)[0]
    cache = made(llm, Eviction(V3(0.5, prefix=64, window=64), on_evict, interval=64, recall_pages=2))
    greedy(llm, cache, prompt, NEW, CHUNK)
    for layer in cache:
        assert layer.offset == LENGTH + NEW
        kept = held(layer) - 2 * PAGE * (on_evict == "host")
        assert kept < 0.5 * LENGTH + CHUNK + 64 + PAGE
        counts = layer.cache.eviction.counts
        assert counts.rounds > 2
        assert (counts.demoted == counts.evicted) == (on_evict == "host")
        starts = layer.cache.page_starts(0)
        assert (np.diff(starts) > 0).all()
    assert sum(entry["eviction"]["evicted"] for entry in forge.report(cache)["layers"]) > 10


def test_keeping_everything_changes_nothing() -> None:
    llm, prompt = model(), tokens(1, LENGTH)[0]
    want, want_logs = greedy(llm, made(llm, None), prompt, NEW, CHUNK)
    found, logs = greedy(llm, made(llm, Eviction(V3(1.0))), prompt, NEW, CHUNK)
    assert found == want
    assert (logs == want_logs).all()


def test_recalling_everything_changes_nothing() -> None:
    """Every demoted page comes back before its step attends, so that only the order of summation differs."""
    llm, prompt = model(), tokens(1, LENGTH)[0]
    _, want = greedy(llm, made(llm, None), prompt, NEW, CHUNK)
    cache = made(llm, Eviction(Recency(0.5), "host", interval=64, recall_share=0.0, recall_pages=100))
    _, logs = greedy(llm, cache, prompt, NEW, CHUNK)
    assert all(layer.cache.eviction.counts.recalled > 5 for layer in cache)
    assert np.abs(logs - want).max() < MLX_MODEL


def test_a_trimmed_cache_goes_on_as_if_it_had_stopped_there() -> None:
    llm, prompt = model(), tokens(1, LENGTH)[0]
    eviction = Eviction(Recency(0.5), interval=64)
    whole, short = made(llm, eviction), made(llm, eviction)
    read(llm, whole, prompt)
    read(llm, whole, tokens(1, 5, seed=3)[0])
    trim_prompt_cache(whole, 5)
    read(llm, short, prompt)
    assert [layer.offset for layer in whole] == [layer.offset for layer in short] == [LENGTH, LENGTH]
    (a, a_logs), (b, b_logs) = (greedy(llm, c, prompt[-1:], NEW) for c in (whole, short))
    assert a == b
    assert np.abs(a_logs - b_logs).max() < MLX_MODEL


def test_a_hybrid_evicts_from_full_attention_alone_and_by_its_scaled_budget() -> None:
    llm, prompt = model("qwen3_next"), tokens(1, LENGTH)[0]
    cache, whole = made(llm, Eviction(V3(0.5, prefix=64, window=64), interval=64)), made(llm, None)
    for c in (cache, whole):
        read(llm, c, prompt)
    packed = [i for i, layer in enumerate(cache) if isinstance(layer, forge.PackedKVCache)]
    assert packed == [3]
    layer = cache[3].cache
    assert layer.eviction.fraction == 0.25
    assert layer.eviction.counts.rounds > 1
    # 1 of 4 layers: 1 - 0.5 / 4
    assert 0.8 < held(cache[3]) / LENGTH < 0.875 + 2 * CHUNK / LENGTH
    # The linear layers before it know nothing of it: their states are the same bits.
    for i in range(3):
        mine, theirs = (dict(tree_flatten(c[i].state)) for c in (cache, whole))
        assert mine.keys() == theirs.keys() != set()
        assert all((np.array(mine[name]) == np.array(theirs[name])).all() for name in mine)
