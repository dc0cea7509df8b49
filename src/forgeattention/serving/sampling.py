"""Next tokens from logits, and text from tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers.decoders import DecodeStream


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn.

    Attributes:
        max_tokens: most new tokens.
        temperature: 0 takes the likeliest token.
        top_p: the likeliest tokens whose probabilities first reach this sum are drawn from.
        stop: texts that end the answer; they are not part of it.
        seed: of the draws, which do not depend on what else is in the batch; None for a random one.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


class Sampler:
    """Draws the tokens of one request."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """The next token by logits [vocabulary]."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        # Less their largest and in float64, so that no temperature above 0 makes an infinity of it.
        logits = logits.double().cpu()
        p = torch.softmax((logits - logits.max()) / self.sampling.temperature, 0)
        if self.sampling.top_p < 1:
            values, order = p.sort(descending=True)
            values[values.cumsum(0) - values >= self.sampling.top_p] = 0
            return int(order[torch.multinomial(values, 1, generator=self._generator)])
        return int(torch.multinomial(p, 1, generator=self._generator))


class TextStream:
    """Text of a request, piece by piece, held back where it may be the beginning of a stop text."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer._tokenizer
        self._decode = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after one more token; `stopped` says whether a stop text was met."""
        self._held += self._decode.step(self._tokenizer, token) or ""
        at = min((i for i in (self._held.find(s) for s in self._stop) if i >= 0), default=-1)
        if at >= 0:
            self.stopped = True
            text, self._held = self._held[:at], ""
            return text
        keep = 0
        for s in self._stop:
            keep = max([keep] + [n for n in range(1, len(s)) if self._held.endswith(s[:n])])
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def flush(self) -> str:
        """What was held back, at the end."""
        text, self._held = self._held, ""
        return text
