"""`forgeattn chat`: mlx-lm's chat in the terminal over a packed cache."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import Any

from .. import models
from .evaluation.setup import spec_from

REPLACED = ("--model", "--max-kv-size")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Chats until the user ends it.

    Raises:
        ValueError: an argument of mlx-lm's that a packed cache has no use for, or a model that cannot be packed.
        RuntimeError: mlx-lm is not installed.
    """
    if importlib.util.find_spec("mlx_lm") is None:
        raise RuntimeError("[chat] mlx-lm is not installed: pip install 'forgeattention[mlx]'")
    from mlx_lm import chat

    from ..integrations.mlx import patched

    for argument in args.arguments:
        if argument.partition("=")[0] in REPLACED:
            raise ValueError(f"[chat] expected no {argument.partition('=')[0]} with a packed cache; got it")
    spec, before = spec_from(args), sys.argv
    sys.argv = ["mlx_lm.chat", "--model", models.folder(args.model), *args.arguments]
    try:
        with patched(spec):
            chat.main()
    finally:
        sys.argv = before
    return {"model": args.model, "spec": spec.to_json()}
