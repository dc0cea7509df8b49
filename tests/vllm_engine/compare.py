"""How far two engines' predictions of a text are apart."""

from __future__ import annotations

import math
from typing import Any

from vllm import SamplingParams


def logprobs(llm: Any, ids: list[int]) -> list[dict[int, float]]:
    """The 20 likeliest tokens at each position of the second half of a text."""
    (out,) = llm.generate(
        [{"prompt_token_ids": ids}], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=20), use_tqdm=False
    )
    return [{k: v.logprob for k, v in d.items()} for d in out.prompt_logprobs[len(ids) // 2 :]]


def divergence(p: list[dict[int, float]], q: list[dict[int, float]]) -> tuple[float, float]:
    """KL over the tokens that both name and the rest as one, and the share of equal top tokens."""
    total = same = 0.0
    for a, b in zip(p, q, strict=True):
        both = a.keys() & b.keys()
        rest = [max(1 - sum(math.exp(x[k]) for k in both), 1e-9) for x in (a, b)]
        total += sum(math.exp(a[k]) * (a[k] - b[k]) for k in both) + rest[0] * math.log(rest[0] / rest[1])
        same += max(a, key=a.__getitem__) == max(b, key=b.__getitem__)
    return total / len(p), same / len(p)
