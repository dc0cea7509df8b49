"""Answers in OpenAI's forms, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from fastapi import HTTPException

from .request import Event, Request
from .sampling import Scored
from .text import TokenTexts
from .tool_calls import CallReader
from .web import error_body

LEAST = -9999.0
"""JSON has no infinity: a token that the model excludes gets this log-probability."""


class Choice(Protocol):
    """One answer as it comes."""

    def push(self, event: Event) -> list[dict[str, Any]]:
        """Takes an event; the entries of `choices` that a stream sends for it."""

    def whole(self) -> dict[str, Any]:
        """The entry of `choices` with all of it."""


class ChatChoice:
    """An answer of a chat.

    Args:
        index: its place among the answers.
        texts: of tokens, for log-probabilities; None where those were not asked for.
        reader: reads calls of tools; None where there can be none.
    """

    def __init__(self, index: int, texts: TokenTexts | None, reader: CallReader | None) -> None:
        self._index = index
        self._texts = texts
        self._reader = reader
        self._begun = False
        self._text = ""
        self._calls: list[dict[str, Any]] = []
        self._scores: list[dict[str, Any]] = []
        self._finish: str | None = None

    def push(self, event: Event) -> list[dict[str, Any]]:
        text = event.text
        calls: list[dict[str, Any]] = []
        if self._reader is not None:
            text, calls = self._reader.push(event.text, last=event.finish is not None)
        scores = [self._score(scored) for scored in event.scores]
        self._text += text
        self._calls += calls
        self._scores += scores
        self._finish = "tool_calls" if event.finish == "stop" and self._calls else event.finish
        pieces = []
        if not self._begun:
            self._begun = True
            pieces.append(self._piece({"role": "assistant", "content": ""}, [], None))
        if text or calls or scores:
            delta = ({"content": text} if text or not calls else {}) | ({"tool_calls": calls} if calls else {})
            pieces.append(self._piece(delta, scores, None))
        if self._finish is not None:
            pieces.append(self._piece({}, [], self._finish))
        return pieces

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._text, "refusal": None}
        if self._calls:
            message["content"] = self._text or None
            message["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in self._calls]
        logprobs = None if self._texts is None else {"content": self._scores, "refusal": None}
        return {"index": self._index, "message": message, "logprobs": logprobs, "finish_reason": self._finish}

    def _piece(self, delta: dict[str, Any], scores: list[Any], finish: str | None) -> dict[str, Any]:
        logprobs = {"content": scores, "refusal": None} if scores else None
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _score(self, scored: Scored) -> dict[str, Any]:
        likeliest = [self._entry(token, logprob) for token, logprob in scored.top]
        return self._entry(scored.token, scored.logprob) | {"top_logprobs": likeliest}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        assert self._texts is not None
        return {
            "token": self._texts.text(token),
            "logprob": _number(logprob),
            "bytes": list(self._texts.bytes(token)),
        }


class TextChoice:
    """An answer to a plain prompt.

    Args:
        index: its place among the answers.
        texts: of tokens, for log-probabilities; None where those were not asked for.
        echo: what stands before the answer.
    """

    def __init__(self, index: int, texts: TokenTexts | None, echo: str) -> None:
        self._index = index
        self._texts = texts
        self._echo = echo
        self._text = ""
        self._length = 0
        self._scores: list[Scored] = []
        self._finish: str | None = None

    def push(self, event: Event) -> list[dict[str, Any]]:
        text = self._echo + event.text
        self._echo = ""
        self._text += text
        self._finish = event.finish
        piece = {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs(event.scores),
            "finish_reason": event.finish,
        }
        self._scores += event.scores
        return [piece] if text or event.scores or event.finish else []

    def whole(self) -> dict[str, Any]:
        self._length = 0
        logprobs = self._logprobs(self._scores)
        return {"index": self._index, "text": self._text, "logprobs": logprobs, "finish_reason": self._finish}

    def _logprobs(self, scores: Sequence[Scored]) -> dict[str, Any] | None:
        if self._texts is None:
            return None
        made: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for scored in scores:
            text = self._texts.text(scored.token)
            # The least likely first: of two tokens with one text the likelier stays.
            entries = [(scored.token, scored.logprob), *scored.top]
            likeliest = {self._texts.text(token): _number(logprob) for token, logprob in reversed(entries)}
            made["tokens"].append(text)
            made["token_logprobs"].append(_number(scored.logprob))
            made["top_logprobs"].append(None if scored.logprob is None else likeliest)
            made["text_offset"].append(self._length)
            self._length += len(text)
        return made


class Answers:
    """The answers to one HTTP request.

    Args:
        head: what every body of it begins with.
        choices, requests: the answers, and what the engine was asked for each.
        events: what the engine tells, with the answer's place.
    """

    def __init__(
        self,
        head: dict[str, Any],
        choices: Sequence[Choice],
        requests: Sequence[Request],
        events: asyncio.Queue[tuple[int, Event]],
    ) -> None:
        self._head = head
        self._choices = choices
        self._requests = requests
        self._events = events
        self._tokens = [0] * len(choices)
        self._open = len(choices)

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed.

        Raises:
            HTTPException: an answer that failed or was cut.
        """
        while self._open:
            event, _ = self._take(await self._events.get())
            if event.finish == "error":
                raise HTTPException(500, event.error)
            if event.finish == "cancelled":
                raise HTTPException(503, "the server is ending", {"Retry-After": "30"})
        return self._head | {"choices": [choice.whole() for choice in self._choices], "usage": self._usage()}

    async def stream(self, with_usage: bool, keep_alive: float) -> AsyncIterator[str]:
        """Server-sent events.

        Args:
            with_usage: whether an event with the usage ends them.
            keep_alive: a comment goes out after so many seconds of silence, so that nothing between here and the
                client takes the connection for dead.
        """
        head = self._head | ({"usage": None} if with_usage else {})
        while self._open:
            try:
                item = await asyncio.wait_for(self._events.get(), keep_alive)
            except TimeoutError:
                yield ": keep-alive\n\n"
                continue
            event, pieces = self._take(item)
            if event.finish in ("error", "cancelled"):
                status = 500 if event.finish == "error" else 503
                yield _sse(error_body(status, event.error or "the server is ending", event.finish))
                return
            for piece in pieces:
                yield _sse(head | {"choices": [piece]})
        if with_usage:
            yield _sse(self._head | {"choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _take(self, item: tuple[int, Event]) -> tuple[Event, list[dict[str, Any]]]:
        i, event = item
        self._tokens[i] = event.tokens
        if event.finish in ("error", "cancelled"):
            return event, []
        self._open -= event.finish is not None
        return event, self._choices[i].push(event)

    def _usage(self) -> dict[str, Any]:
        prompts = {id(request.prompt): request for request in self._requests}.values()  # copies share their prompt
        read, new = sum(len(request.prompt) for request in prompts), sum(self._tokens)
        return {
            "prompt_tokens": read,
            "completion_tokens": new,
            "total_tokens": read + new,
            "prompt_tokens_details": {"cached_tokens": sum(request.cached for request in prompts)},
        }


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
