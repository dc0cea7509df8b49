"""What the engine is asked, and what it tells."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..codec import PAGE
from .sampling import Sampler, Sampling, Scored

if TYPE_CHECKING:
    from ..integrations.hf.cache import ForgeCache
    from .grammar import Grammar
    from .text import TextStream


class Busy(Exception):
    """The queue is full, or the server is ending; `retry_after` in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Event:
    """What a request's listener is told: new text; at the end also why it ended.

    Attributes:
        text: new text, possibly empty.
        finish: None, "stop", "length", "cancelled" or "error".
        tokens: new tokens so far.
        error: what went wrong, for "error".
        scores: the tokens since the last event with their log-probabilities, where those were asked for. They come
            with the text that they are of, except for text that is held back since it may begin a stop text.
    """

    text: str
    finish: str | None = None
    tokens: int = 0
    error: str = ""
    scores: tuple[Scored, ...] = ()


@dataclass(eq=False)
class Request:
    """A prompt and how to go on from it.

    Attributes:
        prompt: tokens.
        sampling: how the next ones are drawn.
        listener: told of every event, from the engine's thread; it must not wait.
        grammar: what the answer must look like, or None.
        copies: more answers to the same prompt, which is read once: they are submitted, and until it is read
            cancelled, with this request.
    """

    prompt: list[int]
    sampling: Sampling
    listener: Callable[[Event], None]
    grammar: Grammar | None = None
    copies: tuple[Request, ...] = ()
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    finish: str | None = None
    cached: int = 0
    new: list[int] = field(default_factory=list)
    scores: list[Scored] = field(default_factory=list)
    read: int = 0
    cache: ForgeCache | None = None
    sampler: Sampler | None = None
    text: TextStream | None = None

    @property
    def pages(self) -> int:
        """Pages of a layer that the whole answer may fill."""
        return (len(self.prompt) + self.sampling.max_tokens) // PAGE + 1

    @property
    def answers(self) -> tuple[Request, ...]:
        """This request and its copies."""
        return (self, *self.copies)

    @property
    def growth(self) -> int:
        """Pages of a layer that this request and its copies may still add; copies share those of the prompt."""
        return max(0, self.pages - self.read // PAGE) + sum(
            max(0, copy.pages - max(copy.read, len(copy.prompt)) // PAGE) for copy in self.copies
        )

    def told(self) -> tuple[Scored, ...]:
        """The scores since the last event; the next one starts anew."""
        scores, self.scores = tuple(self.scores), []
        return scores
