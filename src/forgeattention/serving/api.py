"""The HTTP side: OpenAI's chat and plain completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .engine import Busy, Engine, Event
from .engine import Request as Job
from .sampling import Sampling
from .schema import Chat, Completion, Generation

DEFAULT_TOKENS = 1024
"""Most new tokens where a request names no number."""


class BodyLimit:
    """Refuses bodies of more than `limit` bytes, while they arrive where they do not say how long they are."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        message = f"expected a body of at most {self.limit} bytes"
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limit:
            await _error(413, message, "request_too_large")(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            part = await receive()
            seen += len(part.get("body", b""))
            if seen > self.limit:
                raise HTTPException(413, message)
            return part

        await self.app(scope, counted, send)


def _error(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status, headers)


def create_app(engine: Engine, name: str, *, api_key: str | None = None, max_body: int = 4 << 20) -> FastAPI:
    """The application.

    Args:
        engine: what answers.
        name: the model's name in requests and answers.
        api_key: what clients send as a bearer token; None asks for none.
        max_body: most bytes of a request's body.
    """
    app = FastAPI(title="ForgeAttention", version="1", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, limit=max_body)
    made = int(time.time())

    def authorised(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if api_key is not None and not hmac.compare_digest(given, api_key.encode()):
            raise HTTPException(401, "expected the server's API key", {"WWW-Authenticate": "Bearer"})

    def known(model: str) -> None:
        if model != name:
            raise HTTPException(404, f"expected the model {name!r}; got {model[:200]!r}")

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        engine.metrics.refused(error.status_code)
        codes = {
            401: "invalid_api_key",
            404: "model_not_found",
            413: "request_too_large",
            429: "rate_limit_exceeded",
            503: "unavailable",
        }
        headers = dict(error.headers or {})
        return _error(error.status_code, str(error.detail), codes.get(error.status_code, "invalid_request"), headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        engine.metrics.refused(400)
        first = error.errors()[0]
        where = ".".join(str(x) for x in first["loc"])
        return _error(400, f"{where}: {first['msg']}", "invalid_request")

    def start(body: Generation, prompt: list[int], limit: int | None) -> tuple[Job, asyncio.Queue[Event]]:
        room = engine.max_length - len(prompt)
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        sampling = Sampling(
            max_tokens=limit or max(1, min(DEFAULT_TOKENS, room)),
            temperature=body.temperature,
            top_p=body.top_p,
            stop=body.stops,
            seed=body.seed,
        )
        job = Job(prompt, sampling, lambda event: _tell(loop, events, event))
        try:
            engine.submit(job)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        except Busy as busy:
            status = 503 if engine.draining or not engine.alive else 429
            raise HTTPException(status, str(busy), {"Retry-After": str(busy.retry_after)}) from None
        return job, events

    async def whole(request: Request, job: Job, events: asyncio.Queue[Event]) -> tuple[str, Event]:
        """All of a request's text, unless its client goes away."""
        text = ""
        try:
            while True:
                try:
                    event = await asyncio.wait_for(events.get(), 0.5)
                except TimeoutError:
                    if await request.is_disconnected():
                        raise HTTPException(499, "the client went away") from None
                    continue
                text += event.text
                if event.finish == "error":
                    raise HTTPException(500, event.error)
                if event.finish == "cancelled":
                    raise HTTPException(503, "the server is ending", {"Retry-After": "30"})
                if event.finish is not None:
                    return text, event
        finally:
            engine.cancel(job)

    async def pieces(
        body: Generation, job: Job, events: asyncio.Queue[Event], head: Any, wrap: Any
    ) -> AsyncIterator[str]:
        """Server-sent events of a request; a client that goes away ends it."""
        try:
            while True:
                event = await events.get()
                if event.finish in ("error", "cancelled"):
                    message = event.error or "the server is ending"
                    yield _sse(
                        {"error": {"message": message, "type": "server_error", "param": None, "code": event.finish}}
                    )
                    return
                if event.text or event.finish:
                    yield _sse(head | {"choices": [wrap(event.text, event.finish)]})
                if event.finish:
                    if body.stream_options and body.stream_options.include_usage:
                        yield _sse(head | {"choices": [], "usage": _usage(job, event.tokens)})
                    yield "data: [DONE]\n\n"
                    return
        finally:
            engine.cancel(job)

    async def answer(
        request: Request, body: Generation, job: Job, events: Any, kind: str, wrap: Any, last: Any
    ) -> Response:
        head = {"id": f"{kind[:4]}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if body.stream:
            chunk = "chat.completion.chunk" if kind == "chat.completion" else kind
            stream = pieces(body, job, events, head | {"object": chunk}, wrap)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        text, event = await whole(request, job, events)
        choice = last(text, event.finish or "stop")
        return JSONResponse(head | {"object": kind, "choices": [choice], "usage": _usage(job, event.tokens)})

    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": text}
        for status, text in (
            (400, "A request that cannot be answered"),
            (401, "No or another API key"),
            (404, "Another model"),
            (413, "Too large a body"),
            (429, "Too many wait; see Retry-After"),
            (503, "The server is ending, or its engine has failed"),
        )
    }

    both: dict[str, Any] = {"application/json": {}, "text/event-stream": {}}
    answers = errors | {200: {"description": "An answer, or its pieces as they come", "content": both}}

    @app.post("/v1/chat/completions", dependencies=[Depends(authorised)], responses=answers)
    async def chat(request: Request, body: Chat) -> Response:
        known(body.model)
        if not engine.tokenizer.chat_template:
            raise HTTPException(400, "expected a model with a chat template; use /v1/completions")
        roles = {"developer": "system"}
        messages = [{"role": roles.get(m.role, m.role), "content": m.text} for m in body.messages]
        try:
            prompt = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # templates raise errors of their own for orders of roles that they do not know
            raise HTTPException(400, f"messages: {error}") from None
        job, events = start(body, list(prompt), body.max_completion_tokens or body.max_tokens)
        return await answer(
            request,
            body,
            job,
            events,
            "chat.completion",
            lambda text, why: {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": why},
            lambda text, why: {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": why},
        )

    @app.post("/v1/completions", dependencies=[Depends(authorised)], responses=answers)
    async def completions(request: Request, body: Completion) -> Response:
        known(body.model)
        prompt = engine.tokenizer(body.prompt).input_ids if isinstance(body.prompt, str) else body.prompt
        size = engine.model.config.get_text_config(decoder=True).vocab_size
        if any(token >= size for token in prompt):
            raise HTTPException(400, f"prompt: expected tokens under {size}")
        job, events = start(body, list(prompt), body.max_tokens)

        def choice(text: str, why: str | None) -> dict[str, Any]:
            return {"index": 0, "text": text, "logprobs": None, "finish_reason": why}

        return await answer(request, body, job, events, "text_completion", choice, choice)

    @app.get("/v1/models", dependencies=[Depends(authorised)], responses={401: errors[401]})
    async def models() -> dict[str, Any]:
        entry = {
            "id": name,
            "object": "model",
            "created": made,
            "owned_by": "local",
            "max_model_len": engine.max_length,
        }
        return {"object": "list", "data": [entry]}

    @app.get("/health", responses={503: errors[503]})
    async def health(response: Response) -> dict[str, Any]:
        well = engine.alive and not engine.draining
        response.status_code = 200 if well else 503
        return {"status": "ok" if well else "ending" if engine.draining else "failed"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _tell(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _usage(job: Job, new: int) -> dict[str, Any]:
    read = len(job.prompt)
    return {
        "prompt_tokens": read,
        "completion_tokens": new,
        "total_tokens": read + new,
        "prompt_tokens_details": {"cached_tokens": job.cached},
    }
