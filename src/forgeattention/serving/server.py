"""`forgeattn serve hf`: transformers behind the endpoint of `api`."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import uvicorn

from .. import models
from ..codec import PAGE, CodecSpec
from ..models.shape import head_dim
from ..util.sizes import parse_memory
from .api import create_app
from .engine import Engine
from .options import ServerOptions

log = logging.getLogger("forgeattention")

FLUSH = 5
"""Seconds that clients have to read the last of their answers when the server ends."""


class Server(uvicorn.Server):
    """From the first SIGTERM or SIGINT on answers 503 to new requests while running ones finish, and then ends; a
    second signal cuts those that are left.

    Args:
        config: uvicorn's.
        engine: what is drained.
        seconds: how long running requests have.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, seconds: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._seconds = seconds
        self._drain: threading.Thread | None = None
        self.cut = 0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own ends the server at once, and raises the signals again when it has ended.
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain is not None:
            self._engine.hurry()
            return
        self._engine.draining = True
        self._drain = threading.Thread(target=self._end, name="drain")
        self._drain.start()

    def _end(self) -> None:
        try:
            self.cut = self._engine.drain(self._seconds)
        finally:  # clients have been told by now; uvicorn waits until they have read it, FLUSH seconds at most
            self.should_exit = True


def serve(model: str, spec: CodecSpec, *, host: str, port: int, options: ServerOptions | None = None) -> None:
    """Serves until SIGTERM or SIGINT, then lets requests finish and keeps their prefixes.

    Args:
        model: a name of `models.load`.
        spec: how caches are coded.
        host, port: where to listen; port 0 takes a free one.
        options: how the server runs; None for the defaults. The API key is the environment's FORGEATTENTION_API_KEY.

    Raises:
        ValueError: arguments that make no sense, or a model that cannot be packed.
    """
    options = options or ServerOptions()
    key = os.environ.get("FORGEATTENTION_API_KEY") or None
    if key is None and not _is_loopback(host):
        log.warning("%s is not a loopback address and FORGEATTENTION_API_KEY is not set: anyone may ask", host)
    loaded, tokenizer = models.load(
        model, dtype=getattr(torch, options.dtype), device=options.device, attn_implementation="forge"
    )
    engine = make_engine(loaded, tokenizer, spec, options)
    name = options.served_name or models.served_name(model, short=True)
    app = create_app(engine, name, api_key=key, max_body=options.max_body, cors=options.cors)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=FLUSH, lifespan="off")
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        address, port = sock.getsockname()[:2]
        print(f"{name} at http://{address}:{port}/v1, room for {engine.max_pages * PAGE} packed tokens", flush=True)
        server = Server(config, engine, options.drain)
        try:
            server.run(sockets=[sock])
        finally:
            cut = server.cut + engine.drain(0)
            print(f"ended; {cut} requests were cut short", flush=True)


def make_engine(model: Any, tokenizer: Any, spec: CodecSpec, options: ServerOptions) -> Engine:
    """The engine that these options ask for."""
    text = model.config.get_text_config(decoder=True)
    page = text.num_key_value_heads * spec.page_format(head_dim(model)).record_bytes * text.num_hidden_layers
    pages = parse_memory(options.cache_memory) // page
    if pages < 1:
        raise ValueError(f"[serve] expected --cache-memory of at least {page} bytes; got {options.cache_memory}")
    return Engine(
        model,
        tokenizer,
        spec,
        max_pages=pages,
        max_running=options.max_running,
        max_waiting=options.max_waiting,
        piece=options.piece,
        prefixes=options.prefixes,
        folder=options.prefix_folder,
        max_disk_bytes=parse_memory(options.prefix_disk),
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
