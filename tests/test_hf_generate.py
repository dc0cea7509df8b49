"""generate() with a packed cache against the same with stock layers that hold the decoded values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_slow import model, slow_cache
from transformers import DynamicCache

from forgeattention import CodecSpec
from forgeattention.cache import STEP_TOKENS
from forgeattention.codec import PAGE
from forgeattention.integrations.hf.cache import ForgeCache

SPEC = CodecSpec(k_bits=3, v_bits=2, sinks=3, window=12)
PROMPT = 170


@pytest.fixture(scope="module")
def llama() -> Any:
    return model()


def prompt(rows: int = 2, n: int = PROMPT, pad: int = 0, repeat: int = 1) -> dict[str, torch.Tensor]:
    """Random tokens; row i starts with i * pad padded ones."""
    made = torch.Generator().manual_seed(rows + pad)
    ids = torch.randint(1, 97, (rows, n), generator=made).repeat(1, repeat)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row * pad] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def both(llama: Any, inputs: dict[str, torch.Tensor], start: list[int] | None = None, **options: Any) -> Any:
    """Tokens of the packed and of the slow cache, and the packed cache. The slow one reads pieces of a few tokens one
    by one, since the packed one gives them the same."""
    options = {"max_new_tokens": 75, "do_sample": False, **options}
    found = []
    cache = ForgeCache(llama.config, SPEC, backend="reference")
    for implementation, past in (("forge", cache), ("sdpa", slow_cache(llama.config, SPEC, start))):
        llama.set_attn_implementation(implementation)
        torch.manual_seed(1)
        if implementation == "sdpa" and options.get("prefill_chunk_size", PAGE) <= STEP_TOKENS:
            options["prefill_chunk_size"] = 1
        found.append(llama.generate(**inputs, past_key_values=past, **options)[:, inputs["input_ids"].shape[1] :])
    llama.set_attn_implementation("forge")
    return (*found, cache)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({}, {}),
    "one row": ({"rows": 1}, {}),
    "a prompt shorter than the window": ({"n": 5}, {}),
    "left padding": ({"rows": 3, "pad": 41}, {}),
    "sampling": ({"pad": 10}, {"do_sample": True}),
    "beams": ({}, {"num_beams": 3, "max_new_tokens": 30}),
    "beams and left padding": ({"pad": 50}, {"num_beams": 2, "max_new_tokens": 30}),
    "prefill in chunks": ({}, {"prefill_chunk_size": 37}),
    "prefill in chunks and left padding": ({"pad": 60}, {"prefill_chunk_size": 32}),
    "prefill in chunks of a few tokens": ({"n": 100, "pad": 9}, {"prefill_chunk_size": 7}),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_decoded_values(llama: Any, case: str) -> None:
    shape, options = CASES[case]
    inputs = prompt(**shape)
    pads = (inputs["attention_mask"] == 0).sum(1).repeat_interleave(options.get("num_beams", 1)).tolist()
    packed, slow, cache = both(llama, inputs, pads, **options)
    assert packed.tolist() == slow.tolist()
    assert len(set(packed[0].tolist())) > 10
    assert cache.layers[0].cache.packed_lengths.min() > 0 or shape.get("n")
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + packed.shape[1] - 1


def test_exact_tokens_alone_give_exactly_the_stock_tokens(llama: Any) -> None:
    inputs = prompt(rows=3, pad=30)
    exact = ForgeCache(llama.config, CodecSpec(window=4096))
    packed = llama.generate(**inputs, past_key_values=exact, max_new_tokens=40, do_sample=False)
    llama.set_attn_implementation("sdpa")
    stock = llama.generate(**inputs, past_key_values=DynamicCache(), max_new_tokens=40, do_sample=False)
    llama.set_attn_implementation("forge")
    assert packed.tolist() == stock.tolist()


def test_assisted_generation_crops(llama: Any) -> None:
    # A repeated prompt makes prompt lookup propose, and the model refuse, many tokens.
    inputs = prompt(rows=1, n=60, repeat=3)
    cropped = []
    cache = ForgeCache(llama.config, SPEC, backend="reference")
    crop = cache.crop
    cache.crop = lambda n: (cropped.append(n), crop(n))[1]  # type: ignore[method-assign]
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "prompt_lookup_num_tokens": 6}
    helped = llama.generate(**inputs, past_key_values=cache, **options)
    plain, slow, single = both(llama, inputs, max_new_tokens=40)
    assert helped[:, inputs["input_ids"].shape[1] :].tolist() == plain.tolist() == slow.tolist()
    assert min(cropped) < 0
    assert cache.layers[0].cache.packed_lengths[0] == single.layers[0].cache.packed_lengths[0] > PAGE


def test_an_assistant_model_with_its_own_packed_cache(llama: Any) -> None:
    inputs = prompt(rows=1)
    assistant = model("qwen3")
    plain, _, _ = both(llama, inputs, max_new_tokens=30)
    cache = ForgeCache(llama.config, SPEC, backend="reference")
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "past_key_values": cache}
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    helped = llama.generate(**inputs, assistant_model=assistant, **options)[:, PROMPT:]
    assert helped.tolist() == plain.tolist()
    assert cache.layers[0].cache.packed_lengths[0] > 0


def test_a_cache_goes_on_where_it_stopped(llama: Any) -> None:
    inputs = prompt(rows=2, pad=20)
    whole, _, _ = both(llama, inputs, [0, 20], max_new_tokens=60)
    cache = ForgeCache(llama.config, SPEC, backend="reference")
    options: dict[str, Any] = {"do_sample": False, "past_key_values": cache}
    first = llama.generate(**inputs, max_new_tokens=25, **options)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 25, dtype=torch.long)], 1)
    second = llama.generate(input_ids=first, attention_mask=mask, max_new_tokens=35, **options)
    assert second[:, PROMPT:].tolist() == whole.tolist()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("head_dim", [80, 128])
def test_other_models_and_head_dims(kind: str, head_dim: int) -> None:
    made = model(kind, head_dim=head_dim)
    packed, slow, _ = both(made, prompt(pad=7), [0, 7], max_new_tokens=70)
    assert packed.tolist() == slow.tolist()
