"""`forgeattn serve`: an OpenAI-compatible server with packed caches, by the engine that the user names.

An engine is a function `serve(model, spec, *, host, port, arguments)` that returns when it is stopped; `arguments` are
more of its own server's command line.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from .evaluation.setup import spec_from

ENGINES = {
    "hf": ("forgeattention.serving.server", "serve"),
    "mlx": ("forgeattention.integrations.mlx.server", "mlx"),
    "vllm": ("forgeattention.integrations.vllm.serve", "vllm"),
}
"""Modules with a `serve`, and the extra that brings what each needs."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serve `args.model` until the server is stopped; returns what was served.

    Raises:
        ValueError: an engine that this version does not have.
        RuntimeError: an engine that is not installed.
    """
    if args.engine not in ENGINES:
        raise ValueError(f"[serve] expected an engine of this version, one of {sorted(ENGINES)}; got {args.engine!r}")
    spec = spec_from(args)
    module, extra = ENGINES[args.engine]
    try:
        engine = importlib.import_module(module)
    except ImportError as error:
        if (error.name or "").startswith("forgeattention"):
            raise
        raise RuntimeError(f"{error}: install it with pip install 'forgeattention[{extra}]'") from error
    engine.serve(args.model, spec, host=args.host, port=args.port, arguments=args.arguments)
    return {"engine": args.engine, "model": args.model, "spec": spec.to_json(), "host": args.host, "port": args.port}
