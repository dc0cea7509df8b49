"""Needles in haystacks, the strict protocol.

A sentence with a code word is put into a long text at a sentence border, the model is asked for it, and only what the
model then generates (greedily) is searched, case-sensitively, for the whole answer. The word or the number alone is no
pass. Needle and question are those of the ForgeAttention drop for Apple silicon (turboquant_plus, pull request 76), and
so are the tests: single, multi, varied, distractors, qa, ramp; kinds follows RULER (arXiv 2404.06654).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import memory, needles, texts
from .haystacks import Document, haystack, named, place, scatter
from .needles import Fact, Hidden, Needle, Outcome, judge
from .setup import eviction_report
from .streaming import attention, spans, step

__all__ = ["DEPTHS", "TESTS", "Cell", "Fact", "Hidden", "Needle", "Outcome", "Reply", "answer", "ask", "documents",
           "haystack", "judge", "place", "prompt", "ramp", "run"]  # fmt: skip

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
TESTS = ("single", "multi", "varied", "distractors", "qa", "kinds")
VARIED = ("licences", "genesis", "code", "json", "table")


@dataclass(frozen=True)
class Reply:
    """What a model answered.

    Attributes:
        text: the generated text, without the prompt and without special tokens.
        prompt_tokens: tokens read.
        new_tokens: tokens generated.
        prefill_seconds: time from the first token read for this question alone to the first one generated.
        decode_seconds: time for the `new_tokens - 1` that follow.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Cell:
    """One question asked: haystack tokens, depth in [0, 1] and what came of it.

    Attributes:
        cache_bytes: held by the cache after the answer.
        eviction: what eviction did in it, if it evicts.
    """

    length: int
    depth: float
    needle: Hidden
    outcome: Outcome
    reply: Reply
    test: str = "single"
    haystack: str = "licences"
    cache_bytes: int = 0
    eviction: dict[str, Any] | None = None


def prompt(tokenizer: Any, text: str, question: str | None = None) -> torch.Tensor:
    """The chat prompt that shows `text` and asks the question: int64, [1, tokens].

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError("[niah] expected a tokenizer with a chat template; got none: take an instruction-tuned model")
    question = Needle().question if question is None else question
    messages = [{"role": "user", "content": f"{text}\n\n{question}"}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return encoded["input_ids"]


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, ids: torch.Tensor, cache: Any, *, read: int = 0, max_new_tokens: int = 24,
    block: int = 256, tail: int = 0,
) -> Reply:  # fmt: skip
    """Read a prompt into a cache, block by block, and generate greedily from it.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        ids: the prompt, int64, [1, tokens].
        cache: a transformers cache that holds the first `read` tokens of the prompt.
        read: less than the prompt has.
        max_new_tokens: generation stops here, or at an end-of-sequence token.
        block: tokens that are read at once.
        tail: of the last so many at most 8 at once.

    Raises:
        ValueError: the cache holds something else, or a number is out of range.
    """
    if max_new_tokens < 1 or not 0 <= read < ids.shape[1]:
        raise ValueError(
            f"[niah] expected max_new_tokens >= 1 and 0 <= read < {ids.shape[1]}; got {max_new_tokens}, {read}"
        )
    if (held := int(cache.get_seq_length())) != read:
        want = f"a cache of {read} tokens" if read else "an empty cache"
        raise ValueError(f"[niah] expected {want}; got one of {held} tokens")
    stop = model.generation_config.eos_token_id
    stops = set(stop) if isinstance(stop, (list, tuple)) else {stop}
    ids = ids.to(model.device)
    start = time.perf_counter()
    whole = ids.shape[1] - read
    early = max(whole - tail, 0)
    pieces = [*spans(early, block), *((early + a, early + b) for a, b in spans(whole - early, min(block, 8)))]
    for first, last in pieces:
        logits = step(model, ids[:, read + first : read + last], cache, keep=1)
    new = [int(logits[0, -1].argmax())]
    done = time.perf_counter()
    while len(new) < max_new_tokens and new[-1] not in stops:
        logits = step(model, torch.tensor([[new[-1]]], device=model.device), cache, keep=1)
        new.append(int(logits[0, -1].argmax()))
    end = time.perf_counter()
    return Reply(tokenizer.decode(new, skip_special_tokens=True), ids.shape[1], len(new), done - start, end - done)


@torch.no_grad()
def ask(
    model: Any,
    tokenizer: Any,
    document: Document,
    make_cache: Callable[[], Any],
    *,
    implementation: str | None = None,
    block: int = 256,
    max_new_tokens: int = 24,
    tail: int = 0,
) -> list[Cell]:
    """Ask all questions of one document.

    What the prompts have in common is read once, and every question goes on from a deep copy of that cache.

    Args:
        model, tokenizer: a transformers causal language model with a chat template.
        document: of `documents`.
        make_cache: makes an empty cache.
        implementation: transformers attention implementation that the cache needs; None leaves the model's.
        block, max_new_tokens, tail: see `answer`.
    """
    prompts = [prompt(tokenizer, document.text, needle.question) for _, needle in document.asked]
    shared = _common(prompts) if len(prompts) > 1 else 0
    cells = []
    with attention(model, implementation):
        common = make_cache()
        if shared and (held := int(common.get_seq_length())) != 0:
            raise ValueError(f"[niah] expected an empty cache; got one of {held} tokens")
        for first, last in spans(shared, block):
            step(model, prompts[0][:, first:last].to(model.device), common, keep=1)
        for ids, (depth, needle), decoys in zip(prompts, document.asked, document.decoys, strict=True):
            cache = copy.deepcopy(common) if shared else common
            setting: dict[str, Any] = {"max_new_tokens": max_new_tokens, "block": block, "tail": tail}
            reply = answer(model, tokenizer, ids, cache, read=shared, **setting)
            outcome = judge(reply.text, needle, decoys=decoys, hay=document.hay)
            held = memory.cache_bytes(cache)
            where = document.test, document.haystack
            cells.append(Cell(document.length, depth, needle, outcome, reply, *where, held, eviction_report(cache)))
    return cells


def documents(
    test: str,
    tokenizer: Any,
    lengths: Sequence[int],
    *,
    depths: Sequence[float] = DEPTHS,
    haystack: str = "licences",
    needle: Hidden | None = None,
    seed: int = 0,
) -> Iterator[Document]:
    """The documents of one test.

    Args:
        test: one of `TESTS`. "single": one needle at every depth. "multi": five code words of different places at once.
            "varied": one code word in every kind of text. "distractors": the code word asked for among those of other
            places that share its word and have the next numbers. "qa": five facts in plain sentences, free answers.
            "kinds": a number, a UUID and a sentence.
        tokenizer: the model's.
        lengths: haystack tokens.
        depths: of the needle, or of as many of the needles (the rest spread evenly).
        haystack: name or file of the text; "varied" has its own.
        needle: for "single" and "varied"; PURPLE ELEPHANT 7742 if None.
        seed: of needles and generated texts.

    Raises:
        ValueError: an unknown test.
    """
    if test not in TESTS:
        raise ValueError(f"[niah] expected a test in {TESTS}; got {test!r}")
    one = needle or Needle()
    for length in lengths:
        for name in VARIED if test == "varied" else (haystack,):
            hay, lines = named(tokenizer, name, length, seed), texts.by_line(name)

            def made(
                hidden: Sequence[tuple[float, Hidden]],
                asked: Sequence[tuple[float, Hidden]],
                decoys: Sequence[Sequence[str]],
                *,
                name: str = name,
                length: int = length,
                hay: str = hay,
                lines: bool = lines,
            ) -> Document:
                text = scatter(hay, hidden, lines=lines)
                return Document(test, name, length, text, hay, tuple(asked), tuple(map(tuple, decoys)))

            if test in ("single", "varied"):
                for depth in depths:
                    yield made([(depth, one)], [(depth, one)], [()])
            elif test == "kinds":
                for kind in needles.KINDS[1:]:
                    for depth in depths:
                        hidden = needles.make(kind, seed)
                        yield made([(depth, hidden)], [(depth, hidden)], [()])
            elif test == "distractors":
                true = needles.several(1, seed)[0] if needle is None or not isinstance(needle, Needle) else needle
                for depth in depths:
                    false = needles.near(true, 4, seed)
                    spread = [((depth + (i + 1) / 5) % 1, other) for i, other in enumerate(false)]
                    wrong = [other.answer for other in false]
                    yield made([(depth, true), *spread], [(depth, true)], [wrong])
            else:
                found: list[Hidden] = [*needles.several(5, seed)] if test == "multi" else [*needles.facts(seed)]
                at = list(depths) if len(depths) == len(found) else [(i + 0.5) / len(found) for i in range(len(found))]
                asked = list(zip(at, found))
                yield made(asked, asked, [[o.answer for o in found if o is not mine] for mine in found])


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
    """The test "single": ask once for every length and depth, each time with a new cache.

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
    for length in lengths:
        hay = haystack(tokenizer, length, text)
        for depth in depths:
            document = Document("single", "text" if text else "licences", length, place(hay, needle, depth), hay,
                                ((depth, needle),), ((),))  # fmt: skip
            setting: dict[str, Any] = {"implementation": implementation, "block": block}
            cells += ask(model, tokenizer, document, make_cache, max_new_tokens=max_new_tokens, **setting)
            if on_cell is not None:
                on_cell(cells[-1])
    return cells


def ramp(start: int, longest: int, fits: Callable[[int], bool], growth: float = 2.0) -> Iterator[int]:
    """Haystack lengths of the stress ramp: `start`, growing until the next does not fit; the last is the longest that
    does, to a sixteenth.

    Args:
        start: first length, tokens.
        longest: never more than this (the model's positions).
        fits: whether a haystack of so many tokens fits into memory.
        growth: factor from one length to the next.

    Raises:
        ValueError: not even `start` fits.
    """
    if start < 1 or growth <= 1 or start > longest or not fits(start):
        raise ValueError(f"[niah] expected a first length that fits, of at most {longest} tokens; got {start}")
    length = start
    while True:
        yield length
        top = min(int(length * growth), longest)
        if top > length and fits(top):
            length = top
            continue
        step_size = max(length // 16, 1)
        room = [n for n in range(length + step_size, top, step_size) if fits(n)]
        if room:
            yield room[-1]
        return


def _common(prompts: Iterable[torch.Tensor]) -> int:
    """Tokens that all prompts start with; at least one of each is left over."""
    rows = [p[0].tolist() for p in prompts]
    shortest = min(map(len, rows)) - 1
    return next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)
