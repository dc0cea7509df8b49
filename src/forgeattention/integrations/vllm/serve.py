"""`forgeattn serve vllm`: becomes vLLM's own OpenAI-compatible server, with the packed cache."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import vllm  # noqa: F401  (a missing vLLM is said before anything is loaded)

from ... import models
from ...codec.spec import PAGE, CodecSpec
from . import check_version
from .settings import KEY, Settings


def command(model: str, spec: CodecSpec, *, host: str, port: int, arguments: Sequence[str] = ()) -> list[str]:
    """The command line of vLLM's server.

    Args:
        model: as for `models.resolve`; a GGUF file is converted first.
        spec: a preset of `codec.presets`, perhaps with other bits.
        host, port: where it listens.
        arguments: more of vLLM's arguments, which go last and so win.

    Raises:
        ValueError: a spec that the settings cannot say, or another vLLM than the tested ones.
    """
    check_version()
    settings = {name: value for name, value in dataclasses.asdict(Settings.of(spec)).items() if value is not None}
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", models.folder(model), "--served-model-name", models.served_name(model)),
        *("--host", host, "--port", str(port)),
        *("--attention-backend", "CUSTOM", "--block-size", str(PAGE)),
        *("--additional-config", json.dumps({KEY: settings})),
        *arguments,
    ]


def serve(model: str, spec: CodecSpec, *, host: str, port: int, arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by vLLM's server; see `command`."""
    argv = command(model, spec, host=host, port=port, arguments=arguments)
    os.execv(argv[0], argv)
