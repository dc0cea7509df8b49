"""ForgeCache in a model: masks, stock layers, refusals, copies, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_slow import model, slow_cache
from tolerances import HF
from transformers import DynamicCache

from forgeattention import CodecSpec
from forgeattention.cache import chunk_torch
from forgeattention.codec import PAGE
from forgeattention.codec.spec import stored_head_dim
from forgeattention.integrations.hf.cache import ForgeCache

SPEC = CodecSpec(k_bits=3, v_bits=2, sinks=3, window=12)
ALL_EXACT = CodecSpec(window=4096)
N = 150

SHARED: dict[str, Any] = {"num_hidden_layers": 4, "sliding_window": 16}
MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": ({}, ["packed"] * 2),
    "qwen3": ({}, ["packed"] * 2),
    "mistral": ({"sliding_window": 16}, ["DynamicSlidingWindowLayer"] * 2),
    "gemma3_text": (
        {**SHARED, "layer_types": ["sliding_attention", "full_attention"] * 2},
        ["DynamicSlidingWindowLayer", "packed"] * 2,
    ),
    "gpt_oss": (
        {
            **SHARED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        ["DynamicSlidingWindowLayer", "packed"] * 2,
    ),
    "gemma4_text": (
        {
            **SHARED,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 128,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 32,
        },
        ["DynamicSlidingWindowLayer", "packed", "DummyLayer", "DummyLayer"],
    ),
    "lfm2": (
        {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
        ["LinearAttentionLayer", "packed"] * 2,
    ),
    "falcon_h1": (
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16},
        ["LinearAttentionAndFullAttentionLayer"] * 2,
    ),
}


@pytest.fixture(scope="module")
def llama() -> Any:
    return model()


def tokens(rows: int = 2, n: int = N, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and their mask; row i starts with i * pad padded ones."""
    ids = torch.randint(1, 97, (rows, n), generator=torch.Generator().manual_seed(n))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row * pad] = 0
    return ids, mask


def read(
    made: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any, steps: list[int], **options: Any
) -> torch.Tensor:
    """Logits [batch, n, vocabulary] of tokens read in steps of the given lengths, the last one for the rest."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits, at = [], 0
    for n in [*steps, ids.shape[1] - sum(steps)]:
        now = slice(at, at + n)
        at += n
        step = {"attention_mask": mask[:, :at], "position_ids": positions[:, now], **options}
        logits.append(made(ids[:, now], past_key_values=cache, **step).logits)
    return torch.cat(logits, 1)


def error(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> float:
    real = mask.bool()
    return float((found - expected)[real].abs().max() / expected[real].abs().max())


@pytest.mark.parametrize("kind", MODELS)
def test_layers_that_are_not_full_attention_stay_stock_and_right(kind: str) -> None:
    changes, kinds = MODELS[kind]
    made = model(kind, **changes)
    ids, mask = tokens(pad=17)
    steps = [60, 40, 1, 1, 5]
    made.set_attn_implementation("eager")
    expected = read(made, ids, mask, DynamicCache(config=made.config), steps)
    made.set_attn_implementation("forge")
    cache = ForgeCache(made.config, ALL_EXACT, backend="reference")
    assert error(read(made, ids, mask, cache, steps), expected, mask) < HF["same_values"]
    report = cache.report()
    # Not all versions of transformers list the layers that read another's keys.
    own = [entry["kind"] for entry in report["layers"] if entry["kind"] != "DummyLayer"]
    assert own == [name for name in kinds if name != "DummyLayer"]
    assert report["packed"] == kinds.count("packed")
    # With a stock cache, or none, "forge" is "sdpa".
    stock = DynamicCache(config=made.config)
    assert error(read(made, ids, mask, stock, steps), expected, mask) < HF["same_values"]
    without = read(made, ids, mask, None, [], use_cache=False)
    assert error(without, expected, mask) < HF["same_values"]


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma4_text", "gemma3_text"])
def test_packed_layers_among_stock_ones(kind: str) -> None:
    made = model(kind, **MODELS[kind][0])
    ids, mask = tokens(pad=23)
    steps = [100, 1, 7, 20]
    cache = ForgeCache(made.config, SPEC, backend="reference")
    found = read(made, ids, mask, cache, steps)
    made.set_attn_implementation("eager")
    expected = read(made, ids, mask, slow_cache(made.config, SPEC, [0, 23]), steps)
    assert error(found, expected, mask) < HF["codes"]
    assert cache.layers[1].cache.packed_lengths.min() >= PAGE


def test_queries_of_the_last_tokens_only() -> None:
    made = model("gemma4_text", **MODELS["gemma4_text"][0])
    ids, mask = tokens(pad=11)
    for keep in (0, 1, 9):
        logits = []
        for implementation in ("eager", "forge"):
            made.set_attn_implementation(implementation)
            cache = ForgeCache(made.config, SPEC, backend="reference")
            if implementation == "eager":
                cache = slow_cache(made.config, SPEC, [0, 11])  # type: ignore[assignment]
            read(made, ids[:, :-30], mask[:, :-30], cache, [])
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -30:]
            rest = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            logits.append(made(ids[:, -30:], logits_to_keep=keep, **rest).logits)
        last = torch.ones(logits[0].shape[:2])
        assert error(logits[1], logits[0], last) < HF["codes"]


@pytest.mark.parametrize("steps", [[], [40, 60], [149], [100, 5, 30], [1] * 20], ids=str)
def test_native_kernels_in_a_model(llama: Any, steps: list[int]) -> None:
    ids, mask = tokens(rows=3, pad=21)
    cache = ForgeCache(llama.config, SPEC)
    found = read(llama, ids, mask, cache, steps)
    llama.set_attn_implementation("sdpa")
    expected = read(llama, ids, mask, slow_cache(llama.config, SPEC, [0, 21, 42], "cpu"), steps)
    llama.set_attn_implementation("forge")
    assert error(found, expected, mask) < HF["codes"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    made = model().to(dtype)
    ids, mask = tokens(pad=21)
    steps = [70, 1, 1, 60]
    cache = ForgeCache(made.config, SPEC)
    found = read(made, ids, mask, cache, steps).float()
    assert cache.layers[0].cache.dtype == str(dtype).removeprefix("torch.")
    made.set_attn_implementation("sdpa")
    own = read(made, ids, mask, slow_cache(made.config, SPEC, [0, 21], "cpu"), steps).float()
    exact = made.float()
    best = read(exact, ids, mask, slow_cache(made.config, SPEC, [0, 21], "cpu"), steps)
    assert error(found, best, mask) < 2 * error(own, best, mask) + HF["codes"]


def test_chunks_hold_what_one_prompt_holds(llama: Any) -> None:
    ids, mask = tokens(pad=13)
    one, many = (ForgeCache(llama.config, SPEC, backend="reference") for _ in range(2))
    read(llama, ids, mask, one, [])
    read(llama, ids, mask, many, [30] * 4)
    a, b = one.layers[0].cache, many.layers[0].cache
    assert a.lengths.tolist() == b.lengths.tolist() == [N, N - 13]
    assert a.packed_lengths.tolist() == b.packed_lengths.tolist()
    # Keys and values of the first layer do not depend on the cache.
    for row in range(2):
        for x, y in zip(a.row_pages(row).tolist(), b.row_pages(row).tolist()):
            assert torch.equal(a.pool.page(x), b.pool.page(y))
    exact_one, exact_many = (ForgeCache(llama.config, ALL_EXACT) for _ in range(2))
    whole, parts = read(llama, ids, mask, exact_one, []), read(llama, ids, mask, exact_many, [30] * 4)
    assert error(parts, whole, mask) < HF["same_values"]


def sees_the_future(made: Any, make: Any, steps: list[int]) -> bool:
    """Whether logits of early tokens change when late ones do."""
    ids, mask = tokens(pad=5)
    other = ids.clone()
    other[:, -20:] = other[:, -20:] % 96 + 1
    early = slice(0, N - 20)
    a, b = (read(made, x, mask, make(), steps)[:, early] for x in (ids, other))
    return not torch.equal(a, b)


@pytest.mark.parametrize("steps", [[], [90], [90, 1, 1]], ids=str)
def test_the_model_is_causal(llama: Any, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    makers = {
        "packed": lambda: ForgeCache(llama.config, SPEC),
        "stock": lambda: DynamicCache(config=llama.config),
    }
    for make in makers.values():
        assert not sees_the_future(llama, make, steps)
    # The same test notices attention without a causal mask.
    right = chunk_torch.attention
    monkeypatch.setattr(chunk_torch, "attention", lambda *a, **k: right(*a, **{**k, "causal": False}))
    assert sees_the_future(llama, makers["packed"], steps)


def test_no_cache_is_causal(llama: Any) -> None:
    ids, mask = tokens(pad=5)
    other = ids.clone()
    other[:, -1] = other[:, -1] % 96 + 1
    a, b = (read(llama, x, mask, None, [], use_cache=False) for x in (ids, other))
    assert torch.equal(a[:, :-1], b[:, :-1])
    assert not torch.equal(a[:, -1], b[:, -1])


def test_padding_in_the_middle_and_at_the_end(llama: Any) -> None:
    ids, mask = tokens()
    mask[0, 80:95] = 0
    mask[1, 120:] = 0
    cache = ForgeCache(llama.config, SPEC, backend="reference")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for at in (slice(0, 90), slice(90, 97), slice(97, 98), slice(98, N)):
        step = {"attention_mask": mask[:, : at.stop], "position_ids": positions[:, at], "past_key_values": cache}
        found = llama(ids[:, at], **step).logits
    assert cache.layers[0].cache.lengths.tolist() == [N - 15, 120]
    for row, real in enumerate(mask.bool()):
        alone = ForgeCache(llama.config, SPEC, backend="reference")
        short = ids[row : row + 1, real]
        # The same steps, less the padding.
        steps = [int(real[a:b].sum()) for a, b in ((0, 90), (90, 97), (97, 98))]
        expected = read(llama, short, torch.ones_like(short), alone, [n for n in steps if n])
        n = int(real[98:].sum())
        assert error(found[row, real[98:]], expected[0, -n:], torch.ones(n)) < HF["same_values"]
    cache.crop(-40)
    assert cache.layers[0].cache.lengths.tolist() == [N - 40 - 15, 110]


def test_a_four_dimensional_mask(llama: Any) -> None:
    ids, mask = tokens(pad=9)
    expected = read(llama, ids, mask, ForgeCache(llama.config, SPEC), [])
    full = torch.ones(N, N, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    additive = torch.zeros(full.shape).masked_fill(~full, torch.finfo(torch.float32).min)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for given in (full, additive):
        cache = ForgeCache(llama.config, SPEC)
        found = llama(ids, attention_mask=given, position_ids=positions, past_key_values=cache).logits
        assert torch.equal(found[mask.bool()], expected[mask.bool()])
    window = full & torch.ones(N, N, dtype=torch.bool).triu(-20)
    for wrong in (window, torch.ones_like(full), additive / 1e9):
        cache = ForgeCache(llama.config, SPEC)
        with pytest.raises(ValueError, match=r"\[forge\] expected a mask that is causal up to padding; got another"):
            llama(ids, attention_mask=wrong, position_ids=positions, past_key_values=cache)
        assert cache.get_seq_length() == 0


def test_another_mask_for_the_past(llama: Any) -> None:
    ids, mask = tokens()
    cache = ForgeCache(llama.config, SPEC)
    llama(ids[:, :100], attention_mask=mask[:, :100], past_key_values=cache)
    mask[0, 50] = 0
    with pytest.raises(ValueError, match=r"\[forge\] expected the padding of earlier steps unchanged; got another"):
        llama(ids[:, 100:], attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 100


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_model_without_forge_is_refused(llama: Any, implementation: str) -> None:
    cache = ForgeCache(llama.config, SPEC)
    llama.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match=r"\[forge\] expected attn_implementation='forge' with a ForgeCache; got"):
        llama(tokens()[0], past_key_values=cache)
    llama.set_attn_implementation("forge")
    assert cache.get_seq_length() == 0
    llama(tokens()[0], past_key_values=cache)
    assert cache.get_seq_length() == N


def test_capped_scores_are_read_by_decoding_and_without_a_cache_computed() -> None:
    soft, ids = model("gemma2", layer_types=["full_attention"] * 2), tokens()[0]
    for what in (soft, soft.config):
        assert [ForgeCache(what, SPEC).report()[name] for name in ("packed", "decoded")] == [0, 2]
    found = soft(ids, use_cache=False).logits
    soft.set_attn_implementation("eager")
    expected = soft(ids, use_cache=False).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < HF["same_values"]
    soft.config.attn_logit_softcapping = None
    for layer in soft.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    uncapped = soft(ids, use_cache=False).logits
    assert float((uncapped - expected).abs().max() / expected.abs().max()) > HF["same_values"], "the cap does nothing"


def test_features_that_packed_layers_lack() -> None:
    plain = r"\[forge\] expected plain causal attention in a packed layer; got LlamaAttention with"
    dropping = model(attention_dropout=0.5).train()
    with pytest.raises(
        ValueError, match=rf"{plain} attention_dropout=0.5 of a model in training mode; call model.eval"
    ):
        dropping(tokens()[0], past_key_values=ForgeCache(dropping.config, SPEC))
    asking = model()
    with pytest.raises(ValueError, match=rf"{plain} output_attentions=True; ask for none"):
        asking(tokens()[0], past_key_values=ForgeCache(asking.config, SPEC), output_attentions=True)


@pytest.mark.parametrize("n", [40, 1])
def test_no_gradient_is_lost_in_silence(llama: Any, n: int) -> None:
    made = model().requires_grad_(True)
    cache = ForgeCache(made.config, SPEC)
    made(tokens()[0][:, :50], past_key_values=cache)
    loss = made(tokens()[0][:, 50 : 50 + n], past_key_values=cache).logits.sum()
    with pytest.raises(ValueError, match=r"\[forge\] expected a ForgeCache in inference only; got a gradient for it"):
        loss.backward()


@pytest.mark.parametrize("head_dim", [32, 48, 72, 112, 160, 192, 320])
def test_heads_of_other_widths_have_zeros_in_their_records(head_dim: int, tmp_path: Path) -> None:
    made = model(head_dim=head_dim)
    ids, mask = tokens(pad=13)
    steps = [100, 1, 20]
    found = read(made, ids, mask, ForgeCache(made, SPEC, backend="reference"), steps)
    cache = ForgeCache(made, SPEC)
    native = read(made, ids, mask, cache, steps)
    made.set_attn_implementation("eager")
    expected = read(made, ids, mask, slow_cache(made.config, SPEC, [0, 13]), steps)
    made.set_attn_implementation("forge")
    assert error(found, expected, mask) < HF["codes"]
    # Few codes of the native encoder are at a tie.
    assert float((native - expected)[mask.bool()].norm() / expected[mask.bool()].norm()) < HF["codes"]
    record = cache.layers[0].cache.codec.format
    assert record.head_dim == stored_head_dim(head_dim, head_dim) >= head_dim
    entry = cache.report()["layers"][0]
    assert entry["bits"] == pytest.approx(8 * record.record_bytes / (2 * PAGE * head_dim))
    assert entry["unpacked_bytes"] == int(mask.sum()) * 2 * 2 * head_dim * 4
    cache.save(tmp_path / "cache", made)
    loaded = ForgeCache.load(tmp_path / "cache", made, SPEC)
    more = {"attention_mask": torch.cat([mask, torch.ones(2, 5, dtype=torch.int64)], 1)}
    logits = [made(ids[:, :5], past_key_values=x, **more).logits for x in (loaded, copy.deepcopy(cache), cache)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("n", [1, 5, 50])
def test_a_bad_step_changes_no_layer_that_sees_it(llama: Any, n: int) -> None:
    ids, _ = tokens()
    cache = ForgeCache(llama.config, SPEC)
    llama(ids[:, :100], past_key_values=cache)
    before = [(x.seen, x.cache.lengths.tolist(), x.cache.nbytes) for x in cache.layers]
    expected = llama(ids[:, 100:], past_key_values=copy.deepcopy(cache)).logits
    bad = llama.get_input_embeddings()(ids[:, 100 : 100 + n])
    bad[1, n // 2] = torch.nan
    with pytest.raises(ValueError, match=r"\[cache.append\] expected finite k; got NaN or infinity"):
        llama(inputs_embeds=bad, past_key_values=cache)
    with pytest.raises(ValueError, match=r"\[cache.append\] expected k \[2, 2, n, 64\]; got \[1, 2,"):
        llama(ids[:1, 100 : 100 + n], past_key_values=cache)
    assert [(x.seen, x.cache.lengths.tolist(), x.cache.nbytes) for x in cache.layers] == before
    assert torch.equal(llama(ids[:, 100:], past_key_values=cache).logits, expected)


def test_layers_out_of_step_are_noticed(llama: Any) -> None:
    ids, _ = tokens()
    cache = ForgeCache(llama.config, SPEC)
    llama(ids[:, :100], past_key_values=cache)
    cache.layers[1].crop(-3)
    with pytest.raises(ValueError, match=r"\[forge_cache\] expected 100 positions in layer 1, as in layer 0; got 97"):
        llama(ids[:, 100:], past_key_values=cache)


def test_exact_layers_and_their_masks(llama: Any) -> None:
    ids, mask = tokens(pad=14)
    steps = [60, 50, 1]
    for exact in (0, 1):
        cache = ForgeCache(llama.config, SPEC, exact_layers=[exact], backend="reference")
        found = read(llama, ids, mask, cache, steps)
        assert cache.report()["layers"][exact]["kind"] == "DynamicLayer"
        slow = slow_cache(llama.config, SPEC, [0, 14])
        slow.layers[exact] = DynamicCache(config=llama.config).layers[exact]
        llama.set_attn_implementation("sdpa")
        expected = read(llama, ids, mask, slow, steps)
        llama.set_attn_implementation("forge")
        assert error(found, expected, mask) < HF["same_values"]
    with pytest.raises(ValueError, match=r"\[forge_cache\] expected layers in \[0, 2\); got \[2\]"):
        ForgeCache(llama.config, exact_layers=[2])
