"""A report has one shape, whichever engine's cache it is of."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from forgeattention import CodecSpec, Eviction, ForgeCache
from forgeattention.cache import LayerCache
from forgeattention.cache.report import packed_entry, stock_entry, totals
from forgeattention.codec import Codec
from forgeattention.eviction import V3
from tests.tiny import llama

KEYS = {"layer", "kind", "positions", "bits", "bytes", "unpacked_bytes"}
SPEC = CodecSpec(sinks=4, window=64)


def read(cache: ForgeCache, made, length: int) -> None:
    ids = torch.arange(length)[None] % 256
    for piece in ids.split(128, dim=1):
        made(piece, past_key_values=cache)


@pytest.fixture(scope="module")
def model():
    return llama(
        hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64, attn_implementation="forge"
    ).float()


def test_transformers(model):
    cache = ForgeCache(model, SPEC, exact_layers=[1])
    before = cache.report()
    assert [set(entry) for entry in before["layers"]] == [KEYS, KEYS]
    assert before["layers"][0]["bytes"] == before["unpacked_bytes"] == 0
    read(cache, model, 400)
    packed, stock = cache.report()["layers"]
    assert (packed["kind"], packed["positions"], stock["kind"], stock["bits"]) == ("packed", 400, "DynamicLayer", None)
    assert packed["unpacked_bytes"] == 400 * 2 * 64 * 4 == stock["bytes"]
    assert packed["bytes"] == cache.layers[0].cache.nbytes
    assert {k: v for k, v in cache.report().items() if k != "layers"} == {
        "packed": 1, "decoded": 0, "of": 2, "bytes": packed["bytes"] + stock["bytes"],
        "unpacked_bytes": 2 * stock["bytes"],
    }  # fmt: skip
    assert json.loads(json.dumps(cache.report())) == cache.report()


def test_eviction_is_summed(model):
    cache = ForgeCache(model, SPEC, eviction=Eviction(V3(0.5)))
    assert cache.report()["eviction"] == {}
    read(cache, model, 1500)
    entries = [entry["eviction"] for entry in cache.report()["layers"]]
    assert cache.report()["eviction"]["evicted"] == sum(entry["evicted"] for entry in entries) > 0


def test_mlx():
    pytest.importorskip("mlx_lm")
    from forgeattention.integrations.mlx import make_prompt_cache, report
    from tests.mlx_models import model as mlx_model

    cache = make_prompt_cache(mlx_model("gemma3_text"), SPEC, fitted=False)
    found = report(cache)
    assert all(set(entry) == KEYS for entry in found["layers"])
    assert set(found) == {"layers", "packed", "decoded", "of", "bytes", "unpacked_bytes"}


def test_one_layer():
    codec = Codec(SPEC, 64, 2)
    k = np.random.default_rng(0).standard_normal((3, 2, 200, 64), np.float32)
    cache = LayerCache.like(k, codec)
    cache.append(k, k)
    entry = packed_entry(5, cache, None, 200)
    assert set(entry) == KEYS
    assert (entry["layer"], entry["bits"], entry["bytes"]) == (5, codec.format.effective_bits, cache.nbytes)
    assert entry["unpacked_bytes"] == 2 * k.nbytes
    both = totals([entry, stock_entry(6, "DynamicLayer", 200, 10)], 2)
    assert (both["packed"], both["of"], both["bytes"]) == (1, 2, cache.nbytes + 10)
