"""RULER's 13 tasks at any length, made anew after their published definitions, and scored as published.

Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?", arXiv 2404.06654:
section 3 and appendix B give the tasks, their parameters and the score, the recall of the answers in the generated
text. Wording, words and texts are our own, and the two question-answering tasks take synthetic paragraphs in place of
SQuAD's and HotpotQA's: scores compare caches with one another, not with the paper's tables.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import niah, ruler_tasks
from .ruler_tasks import Draft
from .streaming import attention

NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
TASKS: dict[str, Callable[[random.Random, int], Draft]] = ruler_tasks.TASKS


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        text: what the user says.
        prefix: how the model's answer starts; it goes on from there.
        answers: what must be said, all of it ("qa": one of them).
        max_new_tokens: of the answer.
        tokens: of the prompt, chat template and prefix included.
    """

    task: str
    text: str
    prefix: str
    answers: tuple[str, ...]
    max_new_tokens: int
    tokens: int


def make(task: str, tokenizer: Any, length: int, seed: int = 0) -> Sample:
    """The question of a task that fills `length` tokens best, the answer's tokens included.

    Args:
        task: one of `TASKS`.
        tokenizer: with a chat template.
        length: most tokens of prompt and answer.
        seed: the same seed gives the same question.

    Raises:
        ValueError: an unknown task, or not even the smallest question fits.
    """
    least = least_length(task, tokenizer, seed)
    if least > length:
        raise ValueError(f"[ruler] expected a length of at least {least} tokens for {task}; got {length}")
    new_tokens = NEW_TOKENS[task.partition("_")[0]]

    def sized(size: int) -> tuple[Draft, int]:
        return _sized(task, tokenizer, seed, size)

    draft, tokens = sized(1)
    low, high = 1, 2
    while (found := sized(high))[1] + new_tokens <= length:
        (draft, tokens), low, high = found, high, 2 * high
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        found = sized(middle)
        if found[1] + new_tokens <= length:
            (draft, tokens), low = found, middle
        else:
            high = middle
    return Sample(task, draft.text, draft.prefix, draft.answers, new_tokens, tokens)


def least_length(task: str, tokenizer: Any, seed: int = 0) -> int:
    """Tokens of a task's smallest question, those to generate included.

    Raises:
        ValueError: an unknown task.
    """
    check(task)
    return _sized(task, tokenizer, seed, 1)[1] + NEW_TOKENS[task.partition("_")[0]]


def _sized(task: str, tokenizer: Any, seed: int, size: int) -> tuple[Draft, int]:
    draft = TASKS[task](random.Random(f"{task} {seed}"), size)
    return draft, _prompt(tokenizer, draft.text, draft.prefix).shape[1]


def answer(
    model: Any, tokenizer: Any, sample: Sample, cache: Any, *, block: int = 256, implementation: str | None = None
) -> str:
    """What the model says to a sample from an empty cache, greedily; without the prompt and the prefix."""
    ids = prompt(tokenizer, sample)
    with attention(model, implementation):
        reply = niah.answer(model, tokenizer, ids, cache, max_new_tokens=sample.max_new_tokens, block=block)
    return reply.text


def score(task: str, generated: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """0 to 100: the mean share of answers that stand in the generated text, in any case; for "qa", whether any does.

    Raises:
        ValueError: an unknown task, or not one list of answers for every text.
    """
    check(task)
    if len(generated) != len(answers) or not generated or not all(answers):
        raise ValueError(f"[ruler] expected answers for each of {len(generated)} > 0 texts; got {len(answers)}")
    shares = []
    for text, wanted in zip(generated, answers):
        found = [answer.lower() in text.lower() for answer in wanted]
        shares.append(float(any(found)) if task.startswith("qa") else sum(found) / len(found))
    return 100 * sum(shares) / len(shares)


def check(task: str) -> None:
    """Raise ValueError unless `task` is one of `TASKS`."""
    if task not in TASKS:
        raise ValueError(f"[ruler] expected a task in {tuple(TASKS)}; got {task!r}")


def prompt(tokenizer: Any, sample: Sample) -> torch.Tensor:
    """The tokens that a sample is asked by, the answer's opening included: int64 [1, tokens]."""
    return _prompt(tokenizer, sample.text, sample.prefix)


def _prompt(tokenizer: Any, text: str, prefix: str) -> torch.Tensor:
    ids = niah.prompt(tokenizer, text, "")
    start = tokenizer(prefix, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return torch.cat([ids, start.to(ids.dtype)], 1)
