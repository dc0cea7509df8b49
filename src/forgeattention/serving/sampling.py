"""Next tokens from logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .grammar import Grammar


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn.

    Attributes:
        max_tokens: most new tokens.
        temperature: 0 takes the likeliest token.
        top_k: that many of the likeliest tokens are drawn from; 0 takes all.
        top_p: of these, the likeliest whose probabilities first reach this sum.
        min_p: of these, the ones at least this share as likely as the likeliest (arXiv 2407.01082).
        repetition_penalty: logits of tokens in the prompt or the answer are divided by it where positive and
            multiplied where negative (arXiv 1909.05858).
        presence_penalty: taken from the logits of tokens in the answer.
        frequency_penalty: taken from them as often as they occur in the answer.
        logit_bias: added to the logits of these tokens.
        stop: texts that end the answer; they are not part of it.
        stop_tokens: tokens that end it, besides the model's own.
        min_tokens: no token ends the answer before it has this many.
        ignore_eos: the model's own end tokens do not end the answer.
        seed: of the draws, which do not depend on what else is in the batch; None for a random one.
        logprobs: how many of the likeliest tokens are told with each token's log-probability; None tells neither.
        score_prompt: whether the prompt's tokens get log-probabilities too.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    min_tokens: int = 0
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    score_prompt: bool = False


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability under the model (before temperature, penalties and all else), and the
    likeliest tokens with theirs. The first token of a prompt has neither."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def score(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[Scored]:
    """Scores of tokens [n] by the logits [n, vocabulary] that they were drawn from, with the `top` likeliest."""
    logits = logits.float()
    total = logits.logsumexp(-1)
    own = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0] - total
    values, ids = logits.topk(min(top, logits.shape[1]), dim=-1)
    likeliest = (values - total[:, None]).tolist()
    return [
        Scored(token, logprob, tuple(zip(names, logprobs)))
        for token, logprob, names, logprobs in zip(tokens, own.tolist(), ids.tolist(), likeliest)
    ]


class Sampler:
    """Draws the tokens of one request.

    Args:
        sampling: how.
        prompt: tokens that the repetition penalty counts too.
        ends: tokens that end the answer, not drawn before `min_tokens`.
        grammar: what the answer must look like, or None.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int] = (), ends: Iterable[int] = (), grammar: Grammar | None = None
    ) -> None:
        self.sampling = sampling
        self.grammar = grammar
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._counts: dict[int, int] = {}
        self._ends = torch.tensor(sorted({*ends, *sampling.stop_tokens}), dtype=torch.long)
        self._biased = torch.tensor(list(sampling.logit_bias), dtype=torch.long)
        self._bias = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float64)
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._plain = grammar is None and not (
            sampling.logit_bias
            or sampling.min_tokens
            or sampling.repetition_penalty != 1
            or sampling.presence_penalty
            or sampling.frequency_penalty
        )

    def __call__(self, logits: torch.Tensor) -> int:
        """The next token by logits [vocabulary].

        Raises:
            ValueError: no token is left that may be drawn.
        """
        if self._plain and self.sampling.temperature == 0:
            return int(logits.argmax())
        # In float64 and less their largest, so that no temperature above 0 makes an infinity of it.
        logits = logits.to("cpu", torch.float64, copy=True)
        if not self._plain:
            self._change(logits)
        token = int(logits.argmax()) if self.sampling.temperature == 0 else self._draw(logits)
        self._counts[token] = self._counts.get(token, 0) + 1
        if self.sampling.repetition_penalty != 1:
            self._seen.add(token)
        if self.grammar is not None:
            self.grammar.take(token)
        return token

    def _change(self, logits: torch.Tensor) -> None:
        """Bias, penalties and what is not allowed, in place."""
        how = self.sampling
        logits[self._biased] += self._bias
        if how.repetition_penalty != 1:
            seen = torch.tensor(list(self._seen), dtype=torch.long)
            old = logits[seen]
            logits[seen] = torch.where(old > 0, old / how.repetition_penalty, old * how.repetition_penalty)
        if self._counts and (how.presence_penalty or how.frequency_penalty):
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float64)
            logits[torch.tensor(list(self._counts))] -= how.presence_penalty + how.frequency_penalty * counts
        if sum(self._counts.values()) < how.min_tokens:
            logits[self._ends] = -torch.inf
        if self.grammar is not None:
            logits[~self.grammar.allowed()] = -torch.inf
        if logits.max() == -torch.inf:
            raise ValueError("[serve] expected a token that may come next; got none that the request allows")

    def _draw(self, logits: torch.Tensor) -> int:
        how = self.sampling
        logits = (logits - logits.max()) / how.temperature
        if not 0 < how.top_k < len(logits) and how.top_p >= 1 and how.min_p == 0:
            return int(torch.multinomial(torch.softmax(logits, 0), 1, generator=self._generator))
        if 0 < how.top_k < len(logits):
            logits, order = logits.topk(how.top_k)
            p = torch.softmax(logits, 0)
        else:
            p, order = torch.softmax(logits, 0).sort(descending=True)
        if how.top_p < 1:
            p[p.cumsum(0) - p >= how.top_p] = 0
        p[p < how.min_p * p[0]] = 0
        return int(order[torch.multinomial(p, 1, generator=self._generator)])
