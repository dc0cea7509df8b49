"""Calibration: the allocation, the file and its refusals, and that a calibrated cache has the bits it was given."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from forgeattention import CodecSpec
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.models.calibration import Calibration
from forgeattention.tools.calibrate import BITS, ERROR, allocate, calibrate, coded_cache, predictions

SPEC = CodecSpec(sinks=2, window=32)


def cost(k_bits: int, v_bits: int) -> float:
    return (k_bits + v_bits) / 2 + 0.1875


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(hidden_size=64, head_dim=64, num_attention_heads=2, num_key_value_heads=1).float()


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=3), budget=st.integers(0, 12))
def test_no_table_of_the_same_size_is_better(values: list[tuple[float, float]], budget: int) -> None:
    sensitivities = dict(enumerate(values))
    table = allocate(sensitivities, cost(2, 2) + min(budget, 4 * len(values)) / 2 / len(values), cost)

    def divergence(bits: list[tuple[int, int]]) -> float:
        return sum(s * ERROR[side][b] for pair, own in zip(bits, values) for side, b, s in zip("kv", pair, own))

    found = [table[i] for i in range(len(values))]
    assert sum(map(sum, found)) <= 4 * len(values) + budget
    pairs = list(itertools.product(BITS, BITS))
    same = (t for t in itertools.product(pairs, repeat=len(values)) if sum(map(sum, t)) == sum(map(sum, found)))
    assert divergence(found) <= min(divergence(list(t)) for t in same) + 1e-9


def test_too_small_a_budget() -> None:
    with pytest.raises(ValueError, match=r"\[calibrate\] expected bits >= 2\.188; got 2"):
        allocate({0: (1.0, 1.0)}, 2.0, cost)


def test_a_coded_layer_holds_what_a_packed_one_does(model: Any) -> None:
    ids = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(0))
    packed = ForgeCache(model, SPEC)
    codecs = {i: packed.layers[i].codec for i in range(2)}
    exact = predictions(model, ids, DynamicCache(config=model.config))
    coded = predictions(model, ids, coded_cache(model, {i: (c, "kv") for i, c in codecs.items()}))
    model.set_attn_implementation("forge")
    real = predictions(model, ids, packed)
    model.set_attn_implementation("sdpa")
    # The packed window holds up to 63 tokens more.
    assert (exact - coded).abs().max() > 1e-3
    assert (real - coded).abs().mean() < (exact - coded).abs().mean()
    none = predictions(model, ids, coded_cache(model, {i: (c, "") for i, c in codecs.items()}))
    assert torch.equal(none, exact)


def test_round_trip_and_bits(model: Any, tmp_path: Path) -> None:
    made = calibrate(model, SPEC, bits=2.7, tokens=256)
    made.save(tmp_path / "file")
    cache = ForgeCache.from_calibration(model, tmp_path / "file")
    bits = [cache.layers[i].codec.format.effective_bits for i in range(2)]
    assert 2.7 - 0.26 < sum(bits) / 2 <= 2.7
    for i in range(2):
        codec = cache.layers[i].codec
        assert (codec.spec.k_bits, codec.spec.v_bits) == made.table[i]
        assert codec.shaping is not None
        assert codec.spec.window == SPEC.window
    model.set_attn_implementation("forge")
    model(torch.zeros(1, 200, dtype=torch.long), past_key_values=cache)
    model.set_attn_implementation("sdpa")
    assert [entry["bits"] for entry in cache.report()["layers"]] == bits


def test_grams_are_those_of_the_queries(model: Any) -> None:
    made = calibrate(model, SPEC, tokens=256)
    for gram in made.grams.values():
        assert gram.shape == (1, 64, 64)
        assert np.linalg.eigvalsh(gram.astype(np.float64)).min() > -1e-4
        np.testing.assert_allclose(np.trace(gram, axis1=1, axis2=2), 64, rtol=1e-5)


def test_other_models_and_files_are_refused(model: Any, tmp_path: Path) -> None:
    made = calibrate(model, SPEC, tokens=256)
    made.save(tmp_path / "file")
    other = tiny.llama(1, hidden_size=64, head_dim=64, num_attention_heads=2, num_key_value_heads=1).float()
    with pytest.raises(ValueError, match=r"\[calibration\] expected model '[0-9a-f]+'; got"):
        Calibration.load(tmp_path / "file", other)
    (tmp_path / "short").write_bytes((tmp_path / "file").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"\[calibration\] expected a complete safetensors file"):
        Calibration.load(tmp_path / "short", model)
    with pytest.raises(ValueError, match=r"\[calibrate\] expected at least 196 tokens; got 100"):
        calibrate(model, SPEC, tokens=100)
