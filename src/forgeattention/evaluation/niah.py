"""Needle in a haystack, the strict protocol.

A sentence with a code word is put into a long text at a sentence border, the model is asked for it, and only what the
model then generates (greedily) is searched, case-sensitively, for the whole answer. The word or the number alone is no
pass. Needle and question are those of the ForgeAttention drop for Apple silicon (turboquant_plus, pull request 76).
"""

from __future__ import annotations

import re
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from . import texts
from .streaming import attention, spans, step

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
QUESTION = "What is the secret code word mentioned earlier? Answer with just the code word and number, nothing else:"
# Between two sentences: the first ends in a word, not in the number of a list; the second starts like a sentence.
BORDER = re.compile(r"""(?<=[A-Za-z)"'][.!?])\s+(?=["'(]?[A-Z])""")


class Outcome(StrEnum):
    """What a generated text says about the needle; only PASS is a pass."""

    PASS = "PASS"
    PARTIAL_WORD = "PARTIAL_WORD"
    PARTIAL_NUMBER = "PARTIAL_NUMBER"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Needle:
    """A code word and a number, hidden in one sentence."""

    word: str = "PURPLE ELEPHANT"
    number: str = "7742"

    @property
    def answer(self) -> str:
        return f"{self.word} {self.number}"

    @property
    def sentence(self) -> str:
        return f"The secret code word is {self.answer}."


@dataclass(frozen=True)
class Reply:
    """What a model answered.

    Attributes:
        text: the generated text, without the prompt and without special tokens.
        prompt_tokens: tokens read.
        new_tokens: tokens generated.
        prefill_seconds: time from the first token read to the first one generated.
        decode_seconds: time for the `new_tokens - 1` that follow.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Cell:
    """One question asked: haystack tokens, depth in [0, 1] and what came of it."""

    length: int
    depth: float
    needle: Needle
    outcome: Outcome
    reply: Reply


def judge(generated: str, needle: Needle) -> Outcome:
    """Search a generated text for the answer, case-sensitively and as whole words.

    Args:
        generated: what the model generated. The prompt holds the needle and must not be part of it.
        needle: what was hidden.
    """

    def found(text: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", generated) is not None

    if found(needle.answer):
        return Outcome.PASS
    if found(needle.word):
        return Outcome.PARTIAL_WORD
    return Outcome.PARTIAL_NUMBER if found(needle.number) else Outcome.FAIL


def haystack(tokenizer: Any, length: int, text: str | None = None) -> str:
    """The first `length` tokens of a text.

    Args:
        tokenizer: the model's tokenizer.
        length: tokens, at least 1.
        text: what to take them from; the shipped licence texts if None.

    Raises:
        ValueError: the text has fewer tokens.
    """
    ids = tokenizer(texts.read("licences") if text is None else text, add_special_tokens=False)["input_ids"]
    if not 1 <= length <= len(ids):
        raise ValueError(f"[niah] expected a haystack length from 1 to the text's {len(ids)} tokens; got {length}")
    return tokenizer.decode(ids[:length])


def place(hay: str, needle: Needle, depth: float) -> str:
    """Put the needle's sentence at the last sentence border at or before `depth` of the haystack.

    Args:
        hay: the haystack; it must not speak of the needle itself.
        needle: what to hide.
        depth: share of the haystack's characters that come before, from 0 (in front) to 1 (at the end).

    Raises:
        ValueError: depth is outside [0, 1], or the haystack holds the needle's word or number.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"[niah] expected a depth in [0, 1]; got {depth}")
    if judge(hay, needle) is not Outcome.FAIL:
        raise ValueError(f"[niah] expected a haystack without {needle.word!r} and {needle.number!r}; got one with them")
    if depth == 1:
        return f"{hay.rstrip()} {needle.sentence}"
    borders = [0, *(match.end() for match in BORDER.finditer(hay))]
    at = borders[bisect_right(borders, int(len(hay) * depth)) - 1]
    return f"{hay[:at]}{needle.sentence} {hay[at:]}"


def prompt(tokenizer: Any, text: str) -> torch.Tensor:
    """The chat prompt that shows `text` and asks the question: int64, [1, tokens].

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError("[niah] expected a tokenizer with a chat template; got none: take an instruction-tuned model")
    messages = [{"role": "user", "content": f"{text}\n\n{QUESTION}"}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return encoded["input_ids"]


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, ids: torch.Tensor, cache: Any, *, max_new_tokens: int = 24, block: int = 256
) -> Reply:
    """Read a prompt into an empty cache, block by block, and generate greedily from it.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        ids: the prompt, int64, [1, tokens].
        cache: an empty transformers cache.
        max_new_tokens: generation stops here, or at an end-of-sequence token.
        block: tokens that are read at once.

    Raises:
        ValueError: the cache is not empty, or a number is not positive.
    """
    if max_new_tokens < 1:
        raise ValueError(f"[niah] expected max_new_tokens >= 1; got {max_new_tokens}")
    if (held := int(cache.get_seq_length())) != 0:
        raise ValueError(f"[niah] expected an empty cache; got one of {held} tokens")
    stop = model.generation_config.eos_token_id
    stops = set(stop) if isinstance(stop, (list, tuple)) else {stop}
    ids = ids.to(model.device)
    start = time.perf_counter()
    for first, last in spans(ids.shape[1], block):
        logits = step(model, ids[:, first:last], cache, keep=1)
    new = [int(logits[0, -1].argmax())]
    read = time.perf_counter()
    while len(new) < max_new_tokens and new[-1] not in stops:
        logits = step(model, torch.tensor([[new[-1]]], device=model.device), cache, keep=1)
        new.append(int(logits[0, -1].argmax()))
    end = time.perf_counter()
    return Reply(tokenizer.decode(new, skip_special_tokens=True), ids.shape[1], len(new), read - start, end - read)


def run(
    model: Any,
    tokenizer: Any,
    make_cache: Callable[[], Any],
    *,
    lengths: Sequence[int] = (2000,),
    depths: Sequence[float] = DEPTHS,
    needle: Needle | None = None,
    text: str | None = None,
    implementation: str | None = None,
    block: int = 256,
    max_new_tokens: int = 24,
    on_cell: Callable[[Cell], None] | None = None,
) -> list[Cell]:
    """Ask once for every length and depth, each time with a new cache.

    Args:
        model, tokenizer: a transformers causal language model with a chat template.
        make_cache: makes an empty cache.
        lengths: haystack lengths in tokens.
        depths: where the needle goes, shares in [0, 1].
        needle: what is hidden; PURPLE ELEPHANT 7742 if None.
        text: the haystack's text; the shipped licence texts if None.
        implementation: transformers attention implementation that the cache needs; None leaves the model's.
        block, max_new_tokens: see `answer`.
        on_cell: called after every question.
    """
    needle = needle or Needle()
    cells = []
    with attention(model, implementation):
        for length in lengths:
            hay = haystack(tokenizer, length, text)
            for depth in depths:
                ids = prompt(tokenizer, place(hay, needle, depth))
                reply = answer(model, tokenizer, ids, make_cache(), max_new_tokens=max_new_tokens, block=block)
                cells.append(Cell(length, depth, needle, judge(reply.text, needle), reply))
                if on_cell is not None:
                    on_cell(cells[-1])
    return cells
