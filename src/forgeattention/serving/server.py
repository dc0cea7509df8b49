"""`forgeattn serve --engine hf`: transformers behind the endpoint of `api`."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
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

log = logging.getLogger("forgeattention")


class Server(uvicorn.Server):
    """Refuses new requests from the first SIGTERM on, while running ones finish."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signals again when it has ended, which would end the process before `drain`.
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.draining = True
        super().handle_exit(sig, frame)


def serve(model: str, spec: CodecSpec, *, host: str, port: int, arguments: Sequence[str]) -> None:
    """Serves until SIGTERM or SIGINT, then lets requests finish and keeps their prefixes.

    Args:
        model: a name of `models.load`.
        spec: how caches are coded.
        host, port: where to listen; port 0 takes a free one.
        arguments: more options, see `parser`. The API key is the environment's FORGEATTN_API_KEY.

    Raises:
        ValueError: arguments that make no sense, or a model that cannot be packed.
    """
    args = parser().parse_args(arguments)
    key = os.environ.get("FORGEATTN_API_KEY") or None
    if key is None and not _is_loopback(host):
        log.warning("%s is not a loopback address and FORGEATTN_API_KEY is not set: anyone may ask", host)
    loaded, tokenizer = models.load(
        model, dtype=getattr(torch, args.dtype), device=args.device, attn_implementation="forge"
    )
    engine = make_engine(loaded, tokenizer, spec, args)
    name = args.served_name or Path(model).name
    app = create_app(engine, name, api_key=key, max_body=args.max_body)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=args.drain, lifespan="off")
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        address, port = sock.getsockname()[:2]
        print(f"{name} at http://{address}:{port}/v1, room for {engine.max_pages * PAGE} packed tokens", flush=True)
        try:
            Server(config, engine).run(sockets=[sock])
        finally:
            cut = engine.drain(args.drain)
            print(f"ended; {cut} requests were cut short", flush=True)


def parser() -> argparse.ArgumentParser:
    """The options after `--`."""
    made = argparse.ArgumentParser(prog="forgeattn serve --engine hf ... --", allow_abbrev=False)
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    made.add_argument("--served-name", help="the model's name in requests (default: that of --model)")
    made.add_argument("--cache-memory", default="1GiB", metavar="SIZE", help="of pages (default %(default)s)")
    made.add_argument("--max-running", type=_positive, default=16, help="requests decoded together")
    made.add_argument("--max-waiting", type=_positive, default=64, help="requests that wait; more get status 429")
    made.add_argument("--max-body", type=_positive, default=4 << 20, metavar="BYTES", help="of a request")
    made.add_argument("--piece", type=_positive, default=512, help="tokens of a prompt read between two steps")
    made.add_argument("--prefixes", type=int, default=32, help="prompt prefixes kept in memory")
    made.add_argument("--prefix-folder", type=Path, help="where prefixes outlast the server")
    made.add_argument("--prefix-disk", default="4GiB", metavar="SIZE", help="most that they take there")
    made.add_argument("--drain", type=_positive, default=30, metavar="SECONDS", help="for running requests at the end")
    return made


def make_engine(model: Any, tokenizer: Any, spec: CodecSpec, args: argparse.Namespace) -> Engine:
    """The engine that the command line asks for."""
    text = model.config.get_text_config(decoder=True)
    page = text.num_key_value_heads * spec.page_format(head_dim(model)).record_bytes * text.num_hidden_layers
    pages = parse_memory(args.cache_memory) // page
    if pages < 1:
        raise ValueError(f"[serve] expected --cache-memory of at least {page} bytes; got {args.cache_memory}")
    return Engine(
        model,
        tokenizer,
        spec,
        max_pages=pages,
        max_running=args.max_running,
        max_waiting=args.max_waiting,
        piece=args.piece,
        prefixes=args.prefixes,
        folder=args.prefix_folder,
        max_disk_bytes=parse_memory(args.prefix_disk),
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more; got {text}")
    return number


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
