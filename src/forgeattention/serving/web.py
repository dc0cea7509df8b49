"""HTTP beneath the endpoint: errors in OpenAI's form, bodies and their limit, the key."""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    429: "rate_limit_exceeded",
    503: "unavailable",
}
UNPAIRED = re.compile("[\ud800-\udfff]")
PATH = re.compile(r"([a-z][a-z0-9_]*(?:\.[a-z0-9_]+)*): ")
"""A field before what is said of it."""


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it; `param` is the field that a message begins with."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    field = PATH.match(message)
    code = code or CODES.get(status, "invalid_request" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": field[1] if field else None, "code": code}}


def error_answer(error: AnyHTTPException) -> JSONResponse:
    """The answer for an exception with a status."""
    code = "model_not_found" if isinstance(error, UnknownModel) else None
    return JSONResponse(error_body(error.status_code, str(error.detail), code), error.status_code, error.headers)


def invalid_answer(error: RequestValidationError) -> JSONResponse:
    """The answer for a body that a schema refuses: the first fault, with its field and what stands there."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return JSONResponse(error_body(400, f"expected a body of JSON; {message}: {first['ctx']['error']}"), 400)
    if first["type"] != "value_error":
        said = json.dumps(first.get("input"), default=str)[:60] if first["type"] != "missing" else "none"
        message = f"{message[:1].lower()}{message[1:]}; got {said}"
    if not PATH.match(message):
        message = f"{where or 'body'}: {message}"
    elif where:  # what a whole object lacks begins with the field
        message = f"{where}.{message}"
    return JSONResponse(error_body(400, message), 400)


class UnknownModel(HTTPException):
    """Another model than the served one."""


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
            await JSONResponse(error_body(413, message), 413)(scope, receive, send)
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


class JSONRequest(Request):
    """A request whose body is text that can be written: JSON may hold half of a character, which Unicode may not."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            found = json.loads(body)
        except json.JSONDecodeError:
            raise
        except (RecursionError, ValueError) as error:
            raise HTTPException(400, f"expected a body of JSON; got one that cannot be read: {error}") from None
        if b"\\ud" in body.lower():
            _check_characters(found, [])
        return found


class JSONRoute(APIRoute):
    """A route whose handler gets a `JSONRequest`."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JSONRequest(request.scope, request.receive))

        return handle


def authorise(request: Request, key: str | None) -> None:
    """Raises HTTPException 401 where a key is asked for and the request has another or none."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if key is None:
        return
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        raise HTTPException(401, "expected the server's API key", {"WWW-Authenticate": "Bearer"})


async def gone(request: Request) -> None:
    """Returns when the client has left. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_characters(value: Any, path: list[str]) -> None:
    if isinstance(value, str):
        if found := UNPAIRED.search(value):
            where = ".".join(path) or "body"
            raise HTTPException(400, f"{where}: expected text; got the unpaired surrogate U+{ord(found[0]):04X} in it")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_characters(key, path)
            _check_characters(item, [*path, key[:100]])
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_characters(item, [*path, str(i)])
