"""Eviction in transformers: hybrids, padding, forks, saved caches, and the command line's refusal."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tolerances import HF
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from forgeattention import CodecSpec
from forgeattention.eviction import V3, Eviction, Recency
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.tools.evaluation.setup import eviction_report, eviction_summary

SPEC = CodecSpec(window=64, refine=False)


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, head_dim=64, vocab_size=97, **changes)
    return with_forge(LlamaForCausalLM(config))


def hybrid():
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=97, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16, full_attention_interval=4,
    )  # fmt: skip
    return with_forge(Qwen3_5ForCausalLM(config))


def with_forge(model):
    model.eval()
    model.set_attn_implementation("forge")
    return model


@torch.no_grad()
def read(model, cache, ids, block=96):
    """Logits of every position, read in blocks."""
    out = [
        model(ids[:, at : at + block], past_key_values=cache, use_cache=True).logits
        for at in range(0, ids.shape[1], block)
    ]
    return torch.cat(out, 1)


def ids_of(n, batch=1, seed=0):
    return torch.randint(0, 97, (batch, n), generator=torch.Generator().manual_seed(seed))


def test_a_hybrid_evicts_from_full_attention_alone_and_by_its_scaled_budget():
    model, ids = hybrid(), ids_of(1500)
    eviction = Eviction(V3(0.5, prefix=64, window=64), interval=64)
    cache, whole = ForgeCache(model, SPEC, eviction=eviction), ForgeCache(model, SPEC)
    read(model, cache, ids)
    read(model, whole, ids)
    assert cache.packed == [3, 7]
    for i in cache.packed:
        layer = cache.layers[i].cache
        # 2 of 8 layers: 1 - 0.5 / 4
        assert layer.eviction.fraction == 0.25
        assert layer.eviction.rope.n_rot == 16
        held = int(layer.packed_lengths[0] + layer.exact_lengths[0])
        assert 0.8 < held / 1500 < 0.875 + 2 * 96 / 1500
        assert layer.lengths.tolist() == [1500]
    assert cache.report()["eviction"]["rounds"] > 2
    assert cache.get_seq_length() == 1500
    # The first linear layers know nothing of attention layers behind them: their states are the same bits.
    for i in range(3):
        mine, theirs = (vars(c.layers[i]) for c in (cache, whole))
        for name, value in mine.items():
            for a, b in zip(tensors(value), tensors(theirs[name]), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for x in value.values() if isinstance(x, torch.Tensor)] if isinstance(value, dict) else []


def test_a_hybrids_rounds_leave_its_linear_states_alone():
    model = hybrid()
    cache = ForgeCache(model, SPEC, eviction=Eviction(V3(0.3, prefix=64, window=64), interval=64))
    read(model, cache, ids_of(1200))
    linear = [i for i in range(8) if i not in cache.packed]
    before = {i: [x.clone() for v in vars(cache.layers[i]).values() for x in tensors(v)] for i in linear}
    assert all(before.values())
    counts = copy.copy(cache.layers[3].cache.eviction.counts)
    layer = cache.layers[3].cache
    k = torch.zeros(1, 2, 1, 64)
    for _ in range(4):
        layer.eviction.history.last[:] = 0
        layer.eviction.settings = Eviction(Recency(0.1), interval=1)
        layer.append(k, k)
    assert layer.eviction.counts.evicted > counts.evicted
    for i in linear:
        now = [x for v in vars(cache.layers[i]).values() for x in tensors(v)]
        assert all(torch.equal(a, b) for a, b in zip(before[i], now, strict=True))


def test_a_trimmed_cache_goes_on_as_if_it_had_stopped_there():
    """Trim within the exact window, behind evicted pages."""
    model, ids = llama(), ids_of(900)
    cache = ForgeCache(model, SPEC, eviction=Eviction(Recency(0.5), interval=64))
    read(model, cache, ids)
    assert cache.report()["eviction"]["evicted"]
    kept = cache.fork()
    read(model, cache, ids_of(20, seed=1))
    cache.crop(-20)
    assert cache.get_seq_length() == 900
    more = ids_of(30, seed=2)
    a, b = read(model, cache, more), read(model, kept, more)
    torch.testing.assert_close(a, b, rtol=0, atol=HF["same_values"] * b.abs().max().item())


@pytest.mark.parametrize("on_evict", ["drop", "host", "disk"])
def test_forked_and_saved_caches_go_on_alike(on_evict, tmp_path):
    model, ids, more = llama(), ids_of(900), ids_of(150, seed=1)
    eviction = Eviction(V3(0.5, prefix=64, window=64), on_evict, interval=64, recall_share=0.9)
    cache = ForgeCache(model, SPEC, eviction=eviction)
    read(model, cache, ids)
    cache.save(tmp_path / "cache", model)
    loaded = ForgeCache.load(tmp_path / "cache", model, SPEC, eviction=eviction)
    fork = copy.deepcopy(cache)
    want, report = read(model, cache, more), cache.report()["eviction"]
    got = read(model, fork, more)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert fork.report()["eviction"].items() >= {k: v for k, v in report.items() if k != "demoted_bytes"}.items()
    again = read(model, loaded, more)
    torch.testing.assert_close(again, want, rtol=0, atol=HF["same_values"] * want.abs().max().item())
    assert loaded.report()["eviction"]["evicted"] == report["evicted"]


def test_padded_rows_are_evicted_as_single_ones():
    model = llama()
    rows = [ids_of(700, seed=1), ids_of(540, seed=2)]
    padded = torch.zeros(2, 700, dtype=torch.int64)
    padded[0], padded[1, 160:] = rows[0][0], rows[1][0]
    mask = torch.ones(2, 700, dtype=torch.int64)
    mask[1, :160] = 0
    eviction = Eviction(Recency(0.5), interval=64)
    both = ForgeCache(model, SPEC, eviction=eviction)
    with torch.no_grad():
        for at in (slice(0, 400), slice(400, 600), slice(600, 700)):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, at]
            out = model(padded[:, at], attention_mask=mask[:, : at.stop], position_ids=positions, past_key_values=both)
    alone = ForgeCache(model, SPEC, eviction=eviction)
    with torch.no_grad():
        for at in (slice(0, 240), slice(240, 440), slice(440, 540)):
            single = model(rows[1][:, at], past_key_values=alone)
    layer, other = both.layers[1].cache, alone.layers[1].cache
    assert layer.lengths.tolist() == [700, 540]
    np.testing.assert_array_equal(layer.page_starts(1), other.page_starts(0))
    error = (out.logits[1, -1] - single.logits[0, -1]).abs().max() / single.logits[0, -1].abs().max()
    assert error < HF["codes"]


def test_decoding_evicts_and_recalls():
    model, ids = llama(), ids_of(400)
    eviction = Eviction(Recency(0.5), "host", interval=16, recall_share=0.0, recall_pages=1)
    cache = ForgeCache(model, SPEC, eviction=eviction)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=120, do_sample=False, pad_token_id=0)
    assert out.shape[1] > 400
    found = cache.report()["eviction"]
    assert found["rounds"] > 2
    assert found["recalled"] > 2
    for layer in (cache.layers[i].cache for i in cache.packed):
        demoted = [d.start for d in layer.eviction.history.demoted[0]]
        every = sorted([*demoted, *layer.page_starts(0).tolist()])
        # nothing is lost or twice
        assert every == [4 + 64 * i for i in range(len(every))]


def test_no_round_is_no_result():
    model = llama()
    cache = ForgeCache(model, SPEC, eviction=Eviction(V3(0.9)))
    read(model, cache, ids_of(60))
    with pytest.raises(ValueError, match=r"\[eval\] expected rounds of eviction; got none"):
        eviction_report(cache)
    assert eviction_report(ForgeCache(model, SPEC)) is None
    assert eviction_report(SimpleNamespace()) is None


def test_centres_from_a_file_serve_a_cache_that_reads_no_prompt(tmp_path):
    from forgeattention.eviction import load_centres, rope_of, save_centres

    model = llama()
    eviction = Eviction(V3(0.5, prefix=64, window=64), interval=64)
    cache = ForgeCache(model, SPEC, eviction=eviction)
    read(model, cache, ids_of(500))
    save_centres(tmp_path / "c", {i: cache.layers[i].cache.eviction.centres for i in cache.packed})
    known = load_centres(tmp_path / "c", rope_of(model.config))
    other = ForgeCache(model, SPEC, eviction=Eviction(eviction.policy, interval=64, centres=known))
    read(model, other, ids_of(800, seed=3))
    count = cache.layers[0].cache.eviction.centres.count
    assert other.layers[0].cache.eviction.centres.count == known[0].count == count > 200
    assert eviction_report(other)["rounds"]


def test_the_summary_adds_up_all_caches():
    report = {"rounds": 3, "evicted": 4, "demoted": 2, "recalled": 1, "held": 30, "seen": 40}
    assert eviction_summary("v3:0.75", [report, report]) == (
        "eviction v3:0.75: 6 rounds of layers, 8 pages evicted, 4 demoted, 2 recalled; "
        "75% of the tokens in memory at the end"
    )
