"""Layers that are read by decoding give what a stock cache with the same decoded values gives."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from families import config_of
from hf_slow import slow_cache
from tolerances import HF
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from forgeattention import CodecSpec, Eviction, SparseSpec
from forgeattention.cache.tiles import Tiles
from forgeattention.eviction import V3
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.integrations.hf.decoded import DecodedLayer

SPEC = CodecSpec(sinks=3, window=12, refine=False)
N = 200
KINDS = {"doge": "forge", "deepseek_v3": "forge", "gemma2": "forge", "bloom": "eager"}
"""One that reads keys itself, one with latents of two widths, one with soft-capped scores, one with ALiBi."""


def made(kind: str, implementation: str | None = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = config_of(next(k for k in MODEL_FOR_CAUSAL_LM_MAPPING if k.model_type == kind), **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation or KINDS[kind])
    return model.eval().requires_grad_(False)


def tokens(rows: int = 2, n: int = N) -> torch.Tensor:
    return torch.randint(3, 90, (rows, n), generator=torch.Generator().manual_seed(n))


def packed(model: Any) -> ForgeCache:
    return ForgeCache(model.config, SPEC)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", [*KINDS, "heads of 16 channels"])
def test_a_padded_batch_through_chunks_steps_crop_and_reordering(kind: str) -> None:
    model, ids = made(kind) if kind in KINDS else made("llama", "forge", head_dim=16), tokens()
    mask = torch.ones(2, N, dtype=torch.int64)
    mask[0, :20] = 0

    def read(cache: Any) -> torch.Tensor:
        out, at = [], 0
        for stop in (90, 97, 120, 121, 122, 160):
            step = {"attention_mask": mask[:, :stop], "position_ids": (mask[:, :stop].cumsum(-1) - 1).clamp(min=0)}
            step["position_ids"] = step["position_ids"][:, at:]
            if kind == "bloom":
                del step["position_ids"]
            out.append(model(ids[:, at:stop], past_key_values=cache, **step).logits)
            at = stop
        cache.crop(-5)
        cache.reorder_cache(torch.tensor([1, 1]))
        rows = mask[[1, 1]]
        out.append(model(ids[:, 155:], attention_mask=rows, past_key_values=cache).logits)
        return torch.cat(out, 1)

    # Widths of heads are the model's to tell, not its config's.
    cache = packed(model) if kind in KINDS else ForgeCache(model, SPEC)
    found = read(cache)
    assert cache.report()["decoded"] == len(cache.coded) > 0
    assert min(cache.layers[i].cache.packed_lengths.min() for i in cache.coded) == 128
    expected = read(slow_cache(model.config, SPEC, [0, 0], "auto", like=cache))
    assert error(found, expected) < HF["codes"]


def test_every_step_gives_what_is_held_and_copies_are_apart() -> None:
    model, ids = made("doge"), tokens(1)
    cache = packed(model)
    model(ids[:, :150], past_key_values=cache)
    twin = copy.deepcopy(cache)
    logits = [model(ids[:, 150:153], past_key_values=c).logits for c in (cache, twin)]
    assert torch.equal(*logits)
    model(ids[:, 153:], past_key_values=cache)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (N, 153)
    before = model(ids[:, 153:155], past_key_values=copy.copy(twin)).logits
    assert torch.equal(model(ids[:, 153:155], past_key_values=twin).logits, before)


def test_memory_is_that_of_one_layer_beside_the_pages() -> None:
    model, ids = made("doge", num_hidden_layers=6), tokens(1, 400)
    cache = packed(model)
    with torch.no_grad():
        model(ids[:, :399], past_key_values=cache)
        model(ids[:, 399:], past_key_values=cache)
    one = cache.report()["layers"][0]["unpacked_bytes"]
    assert cache.nbytes - sum(entry["bytes"] for entry in cache.report()["layers"]) < 1.2 * one
    cache.reset()
    assert cache.get_seq_length() == 0


def test_it_is_said_once_which_layers_and_why(caplog: pytest.LogCaptureFixture) -> None:
    model = made("doge")
    with caplog.at_level(logging.WARNING, "forgeattention"):
        cache = ForgeCache(model)
    said = "ForgeCache reads layers [0, 1] by decoding them at every step: got DogeAttention, which reads their .shape"
    assert sum(said.rpartition(".")[0] in text for text in caplog.messages) == 1
    assert {type(layer) for layer in cache.layers} == {DecodedLayer}
    assert (cache.report()["packed"], cache.report()["decoded"], cache.report()["of"]) == (0, 2, 2)


OPTIONS: dict[str, Any] = {"sparse": SparseSpec(top_k=8), "eviction": Eviction(V3(0.5)), "graph": True}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_need_the_kernels_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"\[forge_cache\] expected no {name}.* are read by decoding; got DogeA"):
        ForgeCache(made("doge"), **{name: OPTIONS[name]})


def test_saved_and_loaded(tmp_path: Any) -> None:
    for kind in ("doge", "deepseek_v3"):
        model, ids = made(kind), tokens()
        cache = ForgeCache(model, SPEC)
        model(ids[:, :190], past_key_values=cache)
        cache.save(tmp_path / kind, model)
        again = ForgeCache.load(tmp_path / kind, model)
        logits = [model(ids[:, 190:], past_key_values=c).logits for c in (cache, again)]
        assert torch.equal(*logits)


def test_a_gradient_through_decoded_keys_is_refused_and_those_of_queries_are_right() -> None:
    model, ids = made("doge").requires_grad_(True), tokens(1)
    cache = packed(model)
    with torch.no_grad():
        model(ids[:, :150], past_key_values=cache)
    loss = model(ids[:, 150:], past_key_values=cache).logits.sum()
    with pytest.raises(ValueError, match=r"\[forge\] expected a ForgeCache in inference only"):
        loss.backward()


def test_a_failed_update_changes_nothing() -> None:
    model, ids = made("deepseek_v3"), tokens(1)
    cache = ForgeCache(model.config, SPEC, max_pages=1)
    model(ids[:, :100], past_key_values=cache)
    held = cache.layers[0].cache.packed_lengths.tolist()
    with pytest.raises(ValueError, match="pages"):
        model(ids[:, 100:], past_key_values=cache)
    assert cache.get_seq_length() == 100
    assert cache.layers[0].cache.packed_lengths.tolist() == held
    model(ids[:, 100:105], past_key_values=cache)


@pytest.mark.parametrize(
    ("heads", "k_dim", "v_dim"), [(1, 512, 64), (2, 192, 128), (3, 16, 16), (1, 48, 200), (4, 48, 48)]
)
def test_tiles_hold_every_channel_once(heads: int, k_dim: int, v_dim: int) -> None:
    spec = CodecSpec()
    tiles = Tiles.smallest(spec, heads, k_dim, v_dim)
    k, v = torch.randn(2, heads, 5, k_dim), torch.randn(2, heads, 5, v_dim)
    both = tiles.pack(k, v)
    assert {tuple(x.shape) for x in both} == {(2, tiles.records, 5, tiles.width)}
    assert sum(int((x != 0).sum()) for x in both) == k.numel() + v.numel()
    for found, given in zip(tiles.unpack(*both), (k, v), strict=True):
        assert torch.equal(found, given)
    used = heads * (k_dim + v_dim) / (2 * tiles.records * tiles.width)
    assert used == pytest.approx({512: 0.9, 192: 1.0, 16: 0.75, 48: 0.775 if heads == 1 else 1.0}[k_dim])


def test_bits_of_latents_count_what_is_stored() -> None:
    model = made("deepseek_v3", kv_lora_rank=512, qk_rope_head_dim=64)
    cache = packed(model)
    model(tokens(1), past_key_values=cache)
    tiles = cache.layers[0].tiles
    assert (tiles.width, tiles.records) == (64, 5)
    bits = cache.report()["layers"][0]["bits"]
    assert bits == pytest.approx(8 * cache.layers[0].cache.codec.page_bytes / (64 * 576))
    assert 3.4 < bits < 3.7
