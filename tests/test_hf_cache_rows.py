"""ForgeCache as an object: copies, rows, files, bytes, names."""

from __future__ import annotations

import copy
import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_slow import model
from test_hf_cache import MODELS, SPEC, N, read, tokens
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from forgeattention.codec import PAGE
from forgeattention.integrations.hf import attention
from forgeattention.integrations.hf.cache import ForgeCache


@pytest.fixture(scope="module")
def llama() -> Any:
    return model()


def test_a_copy_shares_pages_and_nothing_else(llama: Any) -> None:
    ids, mask = tokens(pad=14)
    cache = ForgeCache(llama.config, SPEC)
    read(llama, ids[:, :120], mask[:, :120], cache, [])
    pages = cache.layers[0].cache.pool.in_use
    forks = [copy.deepcopy(cache), cache.fork(), cache]
    assert cache.layers[0].cache.pool.in_use == pages
    positions = (mask.cumsum(-1) - 1)[:, 120:]
    step = {"attention_mask": mask, "position_ids": positions}
    logits = [llama(ids[:, 120:], past_key_values=fork, **step).logits for fork in forks]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    row = cache.fork([1])
    assert (row.layers[0].cache.lengths.tolist(), row.get_seq_length()) == ([N - 14], N)


def test_a_dropped_cache_gives_its_pages_back_at_once(llama: Any) -> None:
    cache = ForgeCache(llama.config, SPEC)
    llama(tokens()[0], past_key_values=cache)
    pool = cache.layers[0].cache.pool
    gc.disable()
    del cache
    gc.enable()
    assert pool.in_use == 0


def test_rows_of_a_batch(llama: Any) -> None:
    ids, mask = tokens(rows=3, pad=14)
    cache = ForgeCache(llama.config, SPEC)
    read(llama, ids, mask, cache, [])
    cache.batch_repeat_interleave(2)
    assert cache.layers[1].cache.lengths.tolist() == [150, 150, 136, 136, 122, 122]
    cache.batch_select_indices(torch.tensor([True, False, False, True, False, True]))
    assert cache.layers[1].cache.lengths.tolist() == [150, 136, 122]
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert cache.layers[1].cache.lengths.tolist() == [122, 122, 150]
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    read(llama, ids[:1], mask[:1], cache, [])
    assert cache.layers[1].cache.lengths.tolist() == [150]


def test_save_and_load(llama: Any, tmp_path: Path) -> None:
    ids, mask = tokens(pad=14)
    cache = ForgeCache(llama, SPEC)
    with pytest.raises(ValueError, match=r"\[cache.save\] expected tokens in every layer; got an empty cache"):
        cache.save(tmp_path / "cache", llama)
    read(llama, ids[:, :120], mask[:, :120], cache, [])
    cache.save(tmp_path / "cache", llama)
    loaded = ForgeCache.load(tmp_path / "cache", llama, SPEC)
    positions = (mask.cumsum(-1) - 1)[:, 120:]
    step = {"attention_mask": mask, "position_ids": positions}
    a, b = (llama(ids[:, 120:], past_key_values=x, **step).logits for x in (cache, loaded))
    assert torch.equal(a, b)
    loaded.crop(-140)
    assert loaded.layers[0].cache.lengths.tolist() == [10, 0]
    with pytest.raises(ValueError, match=r"\[cache.load\] expected codecs"):
        ForgeCache.load(tmp_path / "cache", llama, dataclasses.replace(SPEC, window=13))
    other = model()
    other.lm_head.weight[5, 5] += 1
    other.model.norm.weight += 1e-3
    with pytest.raises(ValueError, match=r"\[cache.load\] expected model"):
        ForgeCache.load(tmp_path / "cache", other, SPEC)
    made = model("gemma3_text", **MODELS["gemma3_text"][0])
    with pytest.raises(
        ValueError, match=r"\[cache.save\] expected packed layers only; got stock caches in layers \[0, 2"
    ):
        ForgeCache(made.config).save(tmp_path / "other", made)


def test_with_and_without_inference_mode_and_gradients() -> None:
    made = model()
    ids, _ = tokens(rows=1, n=400)
    cache, expected = ForgeCache(made.config, SPEC), ForgeCache(made.config, SPEC)
    at = 0
    made.requires_grad_(True)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            made(ids[:, at : at + 75], past_key_values=cache)
            cache.reorder_cache(torch.tensor([0]))
            cache.crop(-5)
        at += 70
    made.requires_grad_(False)
    for first in range(0, 350, 70):
        made(ids[:, first : first + 75], past_key_values=expected)
        expected.crop(-5)
    assert torch.equal(
        made(ids[:, 350:], past_key_values=cache).logits, made(ids[:, 350:], past_key_values=expected).logits
    )


def test_bytes_are_measured_and_close_to_the_format(llama: Any) -> None:
    ids, mask = tokens(rows=1, n=4000)
    short, long = ForgeCache(llama.config), ForgeCache(llama.config)
    read(llama, ids[:, :200], mask[:, :200], short, [])
    read(llama, ids, mask, long, [1000, 1500])
    layer = long.layers[0].cache
    packed = int(layer.packed_lengths[0])
    per_token = (long.nbytes - short.nbytes) / 2 / (packed - int(short.layers[0].cache.packed_lengths[0]))
    assert per_token == pytest.approx(layer.codec.page_bytes / PAGE, rel=0.01)
    assert long.report()["layers"][0]["bits"] == layer.codec.format.effective_bits


def test_names_are_added_and_none_is_touched() -> None:
    assert AttentionInterface._global_mapping["forge"] is attention.forge_attention
    assert AttentionMaskInterface._global_mapping["forge"] is attention.forge_mask
    assert AttentionInterface._global_mapping["sdpa"].__module__.startswith("transformers.")
    assert AttentionMaskInterface._global_mapping["sdpa"].__module__.startswith("transformers.")
