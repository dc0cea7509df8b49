"""`forgeattn serve`: an OpenAI-compatible server with packed caches, by the engine that the user names."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from ..serving.options import ServerOptions
from .evaluation.setup import spec_from

ENGINES = {
    "hf": ("forgeattention.serving.server", "serve", "transformers, with this package's own server"),
    "mlx": ("forgeattention.integrations.mlx.server", "mlx", "mlx_lm.server"),
    "vllm": ("forgeattention.integrations.vllm.serve", "vllm", "vLLM's server"),
}
"""Modules with a `serve`, the extra that brings what each needs, and whose server it is."""


def add_arguments(engine: str, parser: argparse.ArgumentParser) -> None:
    """The options of one engine, beside model, bits, host and port."""
    if engine == "hf":
        ServerOptions.add_arguments(parser)
        return
    parser.set_defaults(passes_on=True)
    whose = ENGINES[engine][2]
    other = {"mlx": "mlx_lm.server", "vllm": "vllm serve"}[engine]
    parser.epilog = f"Every other option goes to {whose}: see `{other} --help`."


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serve `args.model` until the server is stopped; returns what was served.

    Raises:
        RuntimeError: an engine that is not installed.
    """
    spec = spec_from(args)
    module, extra, _ = ENGINES[args.engine]
    try:
        engine = importlib.import_module(module)
    except ImportError as error:
        if (error.name or "").startswith("forgeattention"):
            raise
        raise RuntimeError(f"{error}: install it with pip install 'forgeattention[{extra}]'") from error
    own = {"options": ServerOptions.of(args)} if args.engine == "hf" else {"arguments": args.arguments}
    engine.serve(args.model, spec, host=args.host, port=args.port, **own)
    return {"engine": args.engine, "model": args.model, "spec": spec.to_json(), "host": args.host, "port": args.port}
