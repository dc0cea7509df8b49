"""`forgeattn serve --engine hf`: transformers behind the endpoint of `api`."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import socket
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from ..codec import PAGE, CodecSpec
from ..evaluation.setup import head_dim, setup
from ..plan import parse_memory
from .api import create_app
from .engine import Engine

log = logging.getLogger("forgeattention")


class Server(uvicorn.Server):
    """Refuses new requests from the first SIGTERM on, while running ones finish."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.draining = True
        super().handle_exit(sig, frame)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serve until SIGTERM or SIGINT; returns how it ended."""
    key = os.environ.get("FORGEATTN_API_KEY") or None
    if key is None and not _is_loopback(args.host):
        log.warning("%s is not a loopback address and FORGEATTN_API_KEY is not set: anyone may ask", args.host)
    made = setup(args)
    model, tokenizer = made.model, made.tokenizer
    model.set_attn_implementation("forge")
    engine = make_engine(model, tokenizer, made.spec, args)
    name = args.served_name or Path(str(args.model)).name
    app = create_app(engine, name, api_key=key, max_body=args.max_body)
    config = uvicorn.Config(
        app, host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=int(args.drain), lifespan="off"
    )
    server = Server(config, engine)
    sock = socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((args.host, args.port))
    host, port = sock.getsockname()[:2]
    print(f"{name} at http://{host}:{port}/v1, {engine.max_pages * PAGE} tokens of cache", flush=True)
    try:
        server.run(sockets=[sock])
    finally:
        cut = engine.drain(args.drain)
    return {"served": name, "cut_short": cut, "prefixes_in_memory": len(engine.prefixes)}


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
        folder=Path(args.prefix_folder) if args.prefix_folder else None,
        max_disk_bytes=parse_memory(args.prefix_disk),
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

