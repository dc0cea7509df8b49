"""The needle's checker must not be fooled: by the prompt, by a part of the answer, by a cache that was not empty."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from forgeattention.tools.evaluation import niah, texts
from forgeattention.tools.evaluation.niah import Needle, Outcome
from tests import tiny

HAY = "One goes first. Two comes next! See section 3. of it. Is four last? Five is.\n"


class Parrot:
    """Generates a fixed text, whatever it reads."""

    device = torch.device("cpu")
    config = SimpleNamespace(_attn_implementation="sdpa")
    generation_config = SimpleNamespace(eos_token_id=256)

    def __init__(self, tokenizer, text, prompt_tokens):
        self.script = [*tokenizer(text)["input_ids"], 256]
        self.unread = prompt_tokens
        self.read = []

    def __call__(self, ids, past_key_values, use_cache, logits_to_keep):
        self.read += ids[0].tolist()
        past_key_values.tokens += ids.shape[1]
        said = max(len(self.read) - self.unread, 0)
        logits = torch.zeros(1, 1, 257)
        logits[0, 0, self.script[said]] = 1
        return SimpleNamespace(logits=logits)


class Counter:
    tokens = 0

    def get_seq_length(self):
        return self.tokens


@pytest.mark.parametrize(
    ("generated", "outcome"),
    [
        ("PURPLE ELEPHANT 7742", Outcome.PASS),
        ('The secret code word is "PURPLE ELEPHANT 7742".', Outcome.PASS),
        ("purple elephant 7742", Outcome.PARTIAL_NUMBER),
        ("PURPLE ELEPHANT", Outcome.PARTIAL_WORD),
        ("PURPLE ELEPHANT 7741", Outcome.PARTIAL_WORD),
        ("PURPLE ELEPHANT 77421", Outcome.PARTIAL_WORD),
        ("PURPLE ELEPHANT, 7742", Outcome.PARTIAL_WORD),
        ("7742 PURPLE ELEPHANT", Outcome.PARTIAL_WORD),
        ("7742", Outcome.PARTIAL_NUMBER),
        ("17742", Outcome.FAIL),
        ("PURPLE", Outcome.FAIL),
        ("", Outcome.FAIL),
    ],
)
def test_only_the_whole_answer_passes(generated, outcome):
    assert niah.judge(generated, Needle()) is outcome


@pytest.mark.parametrize("said", ["I do not know.", "", "PURPLE", "7742", "PURPLE ELEPHANT", "PURPLE ELEPHANT 7742"])
@pytest.mark.parametrize("block", [7, 4096])
def test_the_prompt_is_never_searched(said, block):
    tokenizer = tiny.tokenizer()
    ids = niah.prompt(tokenizer, niah.place(HAY, Needle(), 0.5))
    assert "PURPLE ELEPHANT 7742" in tokenizer.decode(ids[0])
    reply = niah.answer(Parrot(tokenizer, said, ids.shape[1]), tokenizer, ids, Counter(), block=block)
    assert reply.text == said
    assert reply.prompt_tokens == ids.shape[1]
    assert (niah.judge(reply.text, Needle()) is Outcome.PASS) == (said == "PURPLE ELEPHANT 7742")


def test_the_model_reads_the_whole_prompt_once_and_then_what_it_said():
    tokenizer = tiny.tokenizer()
    ids = niah.prompt(tokenizer, HAY)
    model = Parrot(tokenizer, "abcdef", ids.shape[1])
    reply = niah.answer(model, tokenizer, ids, Counter(), max_new_tokens=4, block=10)
    assert model.read == [*ids[0].tolist(), *tokenizer("abc")["input_ids"]]
    assert (reply.text, reply.new_tokens) == ("abcd", 4)


@pytest.mark.parametrize("block", [1, 13, 500])
def test_answers_are_those_of_greedy_generation(block):
    tokenizer, lengths = tiny.tokenizer(), set()
    ids = niah.prompt(tokenizer, HAY)
    for seed in range(6):
        model = tiny.llama(seed)
        greedy = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 24}
        want = model.generate(ids, **greedy)[0, ids.shape[1] :]
        reply = niah.answer(model, tokenizer, ids, DynamicCache(config=model.config), block=block)
        assert reply.text == tokenizer.decode(want, skip_special_tokens=True)
        assert reply.new_tokens == len(want)
        lengths.add(len(want))
    # Some end by themselves, others at the limit.
    assert 24 in lengths
    assert len(lengths) > 1


def test_a_cache_that_holds_something_is_refused():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    ids, cache = niah.prompt(tokenizer, HAY), DynamicCache(config=model.config)
    niah.answer(model, tokenizer, ids, cache)
    held = cache.get_seq_length()
    with pytest.raises(ValueError, match=re.escape("[niah] expected an empty cache; got one of")):
        niah.answer(model, tokenizer, ids, cache)
    assert cache.get_seq_length() == held


@pytest.mark.parametrize("depth", [0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 1])
def test_the_needle_stands_between_sentences(depth):
    sentences = ["One goes first.", "Two comes next!", "See section 3. of it.", "Is four last?", "Five is."]
    text = niah.place(HAY, Needle(), depth)
    before, after = text.split(Needle().sentence)
    assert (before + after.lstrip()).split() == HAY.split()
    assert [before.strip() == " ".join(sentences[:i]) for i in range(6)].count(True) == 1
    assert len(before) <= max(len(HAY) * depth, 0) + 1


def test_depth_moves_the_needle_through_the_licences():
    hay = texts.read("licences")
    at = [niah.place(hay, Needle(), depth).index(Needle().sentence) / len(hay) for depth in (0, *niah.DEPTHS, 1)]
    assert at[0] == 0
    assert all(depth - 0.01 < got <= depth for depth, got in zip((*niah.DEPTHS, 1), at[1:], strict=True))


@pytest.mark.parametrize("text", [HAY + "The number is 7742.", HAY + "A PURPLE ELEPHANT came."])
def test_a_haystack_that_knows_the_answer_is_refused(text):
    with pytest.raises(ValueError, match=r"^\[niah\] expected a haystack without"):
        niah.place(text, Needle(), 0.5)


@pytest.mark.parametrize("depth", [-0.01, 1.01, float("nan")])
def test_depth_outside_the_haystack_is_refused(depth):
    with pytest.raises(ValueError, match=r"^\[niah\] expected a depth in \[0, 1\]; got"):
        niah.place(HAY, Needle(), depth)


def test_haystack_has_the_length_asked_for():
    tokenizer = tiny.tokenizer()
    assert len(tokenizer(niah.haystack(tokenizer, 300))["input_ids"]) == 300
    for length in (0, len(HAY) + 1):
        with pytest.raises(ValueError, match=r"^\[niah\] expected a haystack length from 1 to"):
            niah.haystack(tokenizer, length, HAY)


def test_haystacks_of_any_length_do_not_start_over():
    tokenizer = tiny.tokenizer()
    hay = niah.haystack(tokenizer, 900_000)
    assert len(tokenizer(hay)["input_ids"]) == 900_000
    shipped = [texts.read(name) for name in ("licences", "genesis")]
    assert hay.startswith(shipped[0])
    assert hay.count(shipped[1]) == 1
    invented = hay[sum(map(len, shipped)) + 2 :].splitlines()[:-1]
    sentences = [part for line in invented for part in line.split(". ")]
    assert len(sentences) > 5_000
    # Only the last of a paragraph keeps its full stop.
    assert len(set(sentences)) == len(sentences)
    niah.scatter(hay, [(0.99, Needle())])


def test_a_mixed_text_does_not_start_over():
    first = texts.read("genesis").splitlines()[200]
    assert len(first) > 40
    assert texts.enough("mixed", 2_000_000).count(first) == 1


def test_a_model_without_chat_template_is_refused():
    with pytest.raises(ValueError, match=r"^\[niah\] expected a tokenizer with a chat template"):
        niah.prompt(tiny.tokenizer(chat=False), HAY)


def test_run_asks_every_cell_with_a_new_cache():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    made, seen = [], []

    def make_cache():
        made.append(DynamicCache(config=model.config))
        return made[-1]

    cells = niah.run(
        model, tokenizer, make_cache, lengths=(40, 70), depths=(0, 1), text=HAY, max_new_tokens=2,
        implementation="eager", on_cell=seen.append,
    )  # fmt: skip
    assert [(cell.length, cell.depth) for cell in cells] == [(40, 0), (40, 1), (70, 0), (70, 1)]
    assert all(cell.outcome is Outcome.FAIL for cell in cells)
    assert cells == seen
    assert len(made) == 4
    assert model.config._attn_implementation == "sdpa"
