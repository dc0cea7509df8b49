"""SmolLM2 says the same from a packed cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from forgeattention import CodecSpec, models
from forgeattention.integrations.hf.cache import ForgeCache

NOTES = """\
The harbour of Tallin Bay was built in 1874 by the engineer Maria Oskarsdottir, who had studied bridges in Vienna. For
the first thirty years it served fishing boats only, most of them owned by the three families Lund, Berg and Hansen.
The lighthouse at its northern end is 41 metres high, painted in red and white stripes, and its lamp can be seen from
a distance of 22 nautical miles. In the winter of 1912 a storm broke the western wall, and forty volunteers rebuilt it
within eleven weeks with granite from the quarry at Norrvik. Since then a small festival is held every year on the
second Sunday of March: people bring lanterns, eat fish soup with rye bread, and the youngest child of the village
lights a candle in the old customs house. The customs house itself is now a museum. It owns a collection of 600 ship
models, two diving helmets, and the diary of Captain Elias Berg, who sailed to Iceland nine times and wrote about each
voyage. Visitors pay four euros; children and sailors enter free of charge. The museum closes on Mondays and during
the whole of January, when its only keeper, Ms. Ines Holm, visits her sister in Lisbon. A ferry named Sterna crosses
the bay six times a day, and the crossing takes 35 minutes in calm weather."""

# Their greedy answers lead the second best token by more than the noise of four bits.
QUESTIONS = [
    "Repeat the first sentence of the text word for word.",
    "Repeat the last sentence of the text word for word.",
    "What is the diary in the museum about, and who wrote it?",
    "Repeat the sentence about the storm word for word.",
    "Copy the text.",
]


def prompt(question: str) -> str:
    return f"{NOTES.replace(chr(10), ' ')}\n\n{question}"


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return models.load("smollm2", attn_implementation="forge")


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_text_at_four_bits_is_that_of_the_exact_cache(smollm2: Any, question: str) -> None:
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": prompt(question)}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(chat, **options)
    texts = []
    packed = ForgeCache(model.config, CodecSpec(k_bits=4, v_bits=4))
    for implementation, cache in (("sdpa", DynamicCache(config=model.config)), ("forge", packed)):
        model.set_attn_implementation(implementation)
        ids = model.generate(**inputs, past_key_values=cache, do_sample=False, max_new_tokens=32)
        texts.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert texts[1] == texts[0]
    assert len(texts[0].split()) > 5
    assert packed.layers[0].cache.packed_lengths[0] >= 128


def test_answers_come_from_packed_tokens(smollm2: Any) -> None:
    """A page that is damaged in every layer changes the answer: the test above would notice a cache not read."""
    model, tokenizer = smollm2
    model.set_attn_implementation("forge")
    chat = [{"role": "user", "content": prompt(QUESTIONS[0])}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    cache = ForgeCache(model.config, CodecSpec(k_bits=4, v_bits=4))
    with torch.no_grad():
        model(ids["input_ids"][:, :-1], past_key_values=cache, logits_to_keep=1)
        damaged = cache.fork()
        logits = model(ids["input_ids"][:, -1:], past_key_values=cache).logits
        for layer in damaged.layers:
            for page in layer.cache.row_pages(0).tolist():
                layer.cache.pool.page(page)[...] = 0
        assert (model(ids["input_ids"][:, -1:], past_key_values=damaged).logits - logits).abs().max() > 1
