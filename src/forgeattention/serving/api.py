"""The endpoint: OpenAI's chat and plain completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from .answers import Answers, ChatChoice, Choice, TextChoice
from .chat import ChatFormat
from .engine import Engine
from .grammar import Grammar, Grammars
from .prompts import Prompts
from .request import Busy, Event
from .request import Request as Job
from .sampling import Sampling
from .schema import Chat, Completion, Generation
from .text import TokenTexts
from .web import BodyLimit, JSONRoute, UnknownModel, authorise, error_answer, error_body, gone, invalid_answer

T = TypeVar("T")

DEFAULT_TOKENS = 1024
"""Most new tokens where a request names no number."""


def create_app(
    engine: Engine,
    name: str,
    *,
    api_key: str | None = None,
    max_body: int = 4 << 20,
    cors: Sequence[str] = (),
    keep_alive: float = 5.0,
) -> FastAPI:
    """The application.

    Args:
        engine: what answers.
        name: the model's name in requests and answers.
        api_key: what clients send as a bearer token; None asks for none.
        max_body: most bytes of a request's body.
        cors: origins whose pages may ask, "*" for all.
        keep_alive: seconds of silence after which a stream gets a comment.
    """
    app = FastAPI(title="ForgeAttention", version="1", docs_url=None, redoc_url=None)
    app.router.route_class = JSONRoute
    app.add_middleware(BodyLimit, limit=max_body)
    if cors:
        options: dict[str, Any] = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, allow_origins=list(cors), expose_headers=["Retry-After"], **options)
    prompts = Prompts(engine.tokenizer, engine.max_length - 1)
    texts = TokenTexts(engine.tokenizer)
    form = ChatFormat(prompts.template, set(engine.tokenizer.all_special_tokens))
    grammars = Grammars(engine.tokenizer, engine.vocabulary, engine.ends)
    entry = {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "local",
        "max_model_len": engine.max_length,
    }
    preparing = 0

    def authorised(request: Request) -> None:
        authorise(request, api_key)

    def known(model: str | None) -> None:
        if model not in (None, name):
            raise UnknownModel(404, f"model: expected {name!r}; got {str(model)[:200]!r}")

    @app.exception_handler(AnyHTTPException)
    async def refused(_: Request, error: AnyHTTPException) -> Response:
        engine.metrics.refused(error.status_code)
        return error_answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        engine.metrics.refused(400)
        return invalid_answer(error)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return JSONResponse(error_body(500, f"{type(error).__name__}: {error}"), 500)

    def busy(error: Busy) -> HTTPException:
        status = 503 if engine.draining or not engine.alive else 429
        return HTTPException(status, str(error), {"Retry-After": str(error.retry_after)})

    async def prepare(
        count: int, tokens: Callable[[], T], grammar: Callable[[], Grammar | None]
    ) -> tuple[T, Grammar | None]:
        """Makes the tokens and the grammar of `count` answers, off the event loop, where that many may be asked now."""
        nonlocal preparing
        try:
            engine.check_room(count)
            if preparing >= engine.max_waiting:
                raise Busy(f"{preparing} requests are being prepared", 1)
        except Busy as error:
            raise busy(error) from None
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        preparing += 1
        try:
            return await prompts.run(tokens), await prompts.run(grammar)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        finally:
            preparing -= 1

    def submit(
        body: Generation,
        ids: Sequence[list[int]],
        *,
        limit: int | None,
        logprobs: int | None,
        grammar: Grammar | None = None,
        score_prompt: bool = False,
    ) -> tuple[list[Job], asyncio.Queue[tuple[int, Event]]]:
        """Asks the engine for `body.n` answers to each prompt, all of them or none."""
        tokens = (token for tokens in (*ids, body.logit_bias, body.stop_token_ids) for token in tokens)
        if max(tokens, default=0) >= engine.vocabulary:
            raise HTTPException(400, f"prompt, logit_bias, stop_token_ids: expected tokens under {engine.vocabulary}")
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def job(prompt: list[int], at: int, copy: int, copies: tuple[Job, ...] = ()) -> Job:
            room = max(1, min(DEFAULT_TOKENS, engine.max_length - len(prompt)))
            sampling = Sampling(
                max_tokens=room if limit is None else limit,
                temperature=body.temperature,
                top_p=body.top_p,
                top_k=max(0, body.top_k),
                min_p=body.min_p,
                repetition_penalty=body.repetition_penalty,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                logit_bias=body.logit_bias,
                stop=tuple(body.stop),
                stop_tokens=frozenset(body.stop_token_ids),
                min_tokens=body.min_tokens,
                ignore_eos=body.ignore_eos,
                seed=None if body.seed == -1 else body.seed + copy,
                logprobs=logprobs,
                score_prompt=score_prompt and copy == 0,
            )
            place = at * body.n + copy
            own = grammar.copy() if grammar is not None else None
            return Job(prompt, sampling, lambda event: _tell(loop, events, (place, event)), own, copies)

        leaders = [
            job(prompt, at, 0, tuple(job(prompt, at, copy) for copy in range(1, body.n)))
            for at, prompt in enumerate(ids)
        ]
        try:
            engine.submit(*leaders)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        except Busy as error:
            raise busy(error) from None
        return [answer for leader in leaders for answer in leader.answers], events

    def cancel(jobs: Sequence[Job]) -> None:
        for job in jobs:
            engine.cancel(job)

    async def respond(
        request: Request, body: Generation, kind: str, choices: Sequence[Choice], jobs: Sequence[Job], events: Any
    ) -> Response:
        """The answer, whole or streamed; a client that goes away ends its requests."""
        streamed = "chat.completion.chunk" if kind == "chat.completion" else kind
        head = {
            "id": f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{uuid.uuid4().hex}",
            "object": streamed if body.stream else kind,
            "created": int(time.time()),
            "model": name,
        }
        answers = Answers(head, choices, jobs, events)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage

            async def stream() -> AsyncIterator[str]:
                try:
                    async for text in answers.stream(usage, keep_alive):
                        yield text
                finally:
                    cancel(jobs)

            return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        whole, leaving = asyncio.ensure_future(answers.whole()), asyncio.ensure_future(gone(request))
        try:
            await asyncio.wait({whole, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                raise HTTPException(499, "the client went away")
            return JSONResponse(whole.result())
        finally:
            whole.cancel()
            leaving.cancel()
            cancel(jobs)

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
    answered = errors | {200: {"description": "An answer, or its pieces as they come", "content": both}}

    @app.post("/v1/chat/completions", dependencies=[Depends(authorised)], responses=answered)
    async def chat(request: Request, body: Chat) -> Response:
        known(body.model)

        def tokens() -> list[int]:
            form.check(body)
            messages, tools = form.messages(body), form.tools(body)
            try:
                return prompts.chat(messages, tools, body.chat_template_kwargs)
            except ValueError:
                raise
            except Exception as error:  # templates raise errors of their own for orders of roles that they do not know
                raise ValueError(f"messages: {error}") from None

        def grammar() -> Grammar | None:
            return _named("tools", lambda: form.grammar(body, grammars)) or _grammar(grammars, body)

        ids, form_of_it = await prepare(body.n, tokens, grammar)
        jobs, events = submit(
            body,
            [ids],
            limit=body.max_completion_tokens or body.max_tokens,
            logprobs=body.top_logprobs if body.logprobs else None,
            grammar=form_of_it,
        )
        shown = texts if body.logprobs else None
        choices = [ChatChoice(i, shown, form.reader(body)) for i in range(body.n)]
        return await respond(request, body, "chat.completion", choices, jobs, events)

    @app.post("/v1/completions", dependencies=[Depends(authorised)], responses=answered)
    async def completions(request: Request, body: Completion) -> Response:
        known(body.model)

        def tokens() -> list[list[int]]:
            return [prompts.text(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompt]

        count = len(body.prompt) * body.n
        ids, grammar = await prepare(count, tokens, lambda: _grammar(grammars, body))
        jobs, events = submit(
            body,
            ids,
            limit=body.max_tokens,
            logprobs=body.logprobs,
            grammar=grammar,
            score_prompt=body.echo and body.logprobs is not None,
        )
        shown = texts if body.logprobs is not None else None
        choices: list[Choice] = []
        for prompt, read in zip(body.prompt, ids):
            said = "" if not body.echo else prompt if isinstance(prompt, str) else engine.tokenizer.decode(read)
            choices += [TextChoice(len(choices) + i, shown, said) for i in range(body.n)]
        return await respond(request, body, "text_completion", choices, jobs, events)

    @app.get("/v1/models", dependencies=[Depends(authorised)], responses={401: errors[401]})
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get(
        "/v1/models/{model:path}", dependencies=[Depends(authorised)], responses={s: errors[s] for s in (401, 404)}
    )
    async def model(model: str) -> dict[str, Any]:
        known(model)
        return entry

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: errors[503]})
    async def health(response: Response) -> dict[str, Any]:
        well = engine.alive and not engine.draining
        response.status_code = 200 if well else 503
        return {"status": "ok" if well else "ending" if engine.draining else "failed"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _grammar(grammars: Grammars, body: Generation) -> Grammar | None:
    schema = body.response_format.schema_of_text
    return None if schema is None else _named("response_format", lambda: grammars.json(schema))


def _named(field: str, action: Callable[[], T]) -> T:
    try:
        return action()
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def _tell(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Any], event: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)
