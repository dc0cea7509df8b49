"""Masks that transformers' own caches honour are honoured by a ForgeCache, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_slow import model, slow_cache
from tolerances import HF
from transformers import DynamicCache

from forgeattention import CodecSpec
from forgeattention.integrations.hf.cache import ForgeCache

SPEC = CodecSpec(sinks=3, window=12)
ALL_EXACT = CodecSpec(window=4096)
N = 100
NOT_CAUSAL = r"\[forge\] expected a mask that is causal up to padding; got another pattern"
GONE = r"\[forge\] expected the attention_mask of all positions, since earlier ones are padding; got none"
CHANGED = r"\[forge\] expected the padding of earlier steps unchanged; got another mask for the past"


@pytest.fixture(scope="module")
def llama() -> Any:
    return model()


def tokens(rows: int = 2, n: int = N) -> torch.Tensor:
    return torch.randint(1, 97, (rows, n), generator=torch.Generator().manual_seed(n))


def both(made: Any, call: Any, spec: CodecSpec = ALL_EXACT) -> tuple[torch.Tensor, torch.Tensor]:
    """What `call(cache)` gives with a packed and with a stock cache."""
    found = call(ForgeCache(made.config, spec, backend="reference"))
    made.set_attn_implementation("eager")
    expected = call(DynamicCache(config=made.config))
    made.set_attn_implementation("forge")
    return found, expected


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max() / expected.abs().max()) < HF["same_values"]


@pytest.mark.parametrize("chunk", [N, 64, 7])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_logits_at_padding_on_the_right_are_those_of_a_stock_cache(kind: str, chunk: int) -> None:
    made = model(kind, **({"sliding_window": 512} if kind == "gemma3_text" else {}))
    ids, mask = tokens(3), torch.ones(3, N, dtype=torch.int64)
    mask[0, 40:], mask[1, 90:], mask[2, 20:23] = 0, 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def read(cache: Any) -> torch.Tensor:
        out = []
        for at in range(0, N, chunk):
            now = slice(at, min(at + chunk, N))
            step = {"attention_mask": mask[:, : now.stop], "position_ids": positions[:, now]}
            out.append(made(ids[:, now], past_key_values=cache, **step).logits)
        return torch.cat(out, 1)

    close(*both(made, read))


def test_text_after_prompts_padded_on_the_right_is_that_of_a_stock_cache(llama: Any) -> None:
    mask = torch.ones(2, N, dtype=torch.int64)
    mask[0, 61:] = 0
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    found, expected = both(llama, lambda cache: llama.generate(tokens(), past_key_values=cache, **options))
    assert found.tolist() == expected.tolist()


def test_padding_on_the_right_of_packed_tokens(llama: Any) -> None:
    ids, mask = tokens(2, 275), torch.ones(2, 275, dtype=torch.int64)
    mask[0, 255:] = 0
    cache = ForgeCache(llama.config, SPEC, backend="reference")
    llama(ids[:, :250], past_key_values=cache)
    found = llama(ids[:, 250:], attention_mask=mask, past_key_values=cache).logits
    assert cache.layers[0].cache.packed_lengths.min() > 0
    llama.set_attn_implementation("eager")
    slow = slow_cache(llama.config, SPEC, [0, 0])
    llama(ids[:, :250], past_key_values=slow)
    expected = llama(ids[:, 250:], attention_mask=mask, past_key_values=slow).logits
    llama.set_attn_implementation("forge")
    assert float((found - expected).abs().max() / expected.abs().max()) < HF["codes"]


@pytest.mark.parametrize("additive", [False, True])
def test_packed_sequences_are_refused(llama: Any, additive: bool) -> None:
    blocks = torch.block_diag(torch.ones(40, 40), torch.ones(60, 60)).bool().tril()[None, None].expand(2, 1, N, N)
    mask = torch.zeros(blocks.shape).masked_fill(~blocks, torch.finfo(torch.float32).min) if additive else blocks
    cache = ForgeCache(llama.config, SPEC)
    with pytest.raises(ValueError, match=NOT_CAUSAL):
        llama(tokens(), attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_padded_rows_of_a_mask_may_show_nothing_everything_or_themselves(llama: Any) -> None:
    ids, real = tokens(), torch.ones(2, N, dtype=torch.bool)
    real[0, :30] = False
    full = torch.ones(N, N, dtype=torch.bool).tril() & real[:, None, None]
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    step = {"position_ids": positions}
    expected = llama(ids, attention_mask=full, past_key_values=ForgeCache(llama.config, SPEC), **step).logits
    for shown in (torch.ones(30, N, dtype=torch.bool), torch.eye(N, dtype=torch.bool)[:30]):
        mask = full.clone()
        mask[0, 0, :30] = shown
        found = llama(ids, attention_mask=mask, past_key_values=ForgeCache(llama.config, SPEC), **step).logits
        assert torch.equal(found[real], expected[real])


@pytest.mark.parametrize("n", [1, 20])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_later_mask_that_hides_other_tokens_is_refused(kind: str, n: int) -> None:
    made = model(kind, **({"layer_types": ["full_attention", "sliding_attention"]} if kind == "gemma3_text" else {}))
    ids, mask = tokens(), torch.ones(2, N, dtype=torch.int64)
    mask[0, :5] = 0
    cache = ForgeCache(made.config, SPEC)
    made(ids[:, : N - n], attention_mask=mask[:, : N - n], past_key_values=cache)
    other = mask.clone()
    other[0, :10] = torch.tensor([1, 1, 0, 0, 1, 1, 0, 0, 1, 0])
    assert int(other.sum()) == int(mask.sum())
    shown = torch.ones_like(mask)
    for wrong in (other, shown):
        with pytest.raises(ValueError, match=f"{CHANGED}|{GONE}"):
            made(ids[:, N - n :], attention_mask=wrong, past_key_values=cache)
        assert cache.get_seq_length() == N - n
    made(ids[:, N - n :], attention_mask=mask, past_key_values=cache)


def test_no_mask_after_padding(llama: Any) -> None:
    """It hides the earlier padding still, or is refused where stock layers would show it."""
    ids, mask = tokens(), torch.ones(2, N + 1, dtype=torch.int64)
    mask[0, :5] = 0
    logits = []
    for given in (None, mask):
        cache = ForgeCache(llama.config, SPEC)
        llama(ids, attention_mask=mask[:, :-1], past_key_values=cache)
        positions = torch.full((2, 1), N)
        logits.append(llama(ids[:, :1], attention_mask=given, position_ids=positions, past_key_values=cache).logits)
    assert torch.equal(*logits)
    gemma = model("gemma3_text", layer_types=["full_attention", "sliding_attention"])
    cache = ForgeCache(gemma.config, SPEC)
    gemma(ids, attention_mask=mask[:, :-1], past_key_values=cache)
    with pytest.raises(ValueError, match=GONE):
        gemma(ids[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == N
    cache.batch_select_indices(torch.tensor([1]))
    gemma(ids[1:, :1], past_key_values=cache)
    assert cache.get_seq_length() == N + 1
