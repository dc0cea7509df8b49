"""The options of the transformers server. Needs no framework, so that `forgeattn serve hf --help` is quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ServerOptions:
    """How the server runs; each is an option of `forgeattn serve hf`.

    Attributes:
        device: where the model runs, "cpu" or "cuda".
        dtype: of weights: "float32", "float16" or "bfloat16".
        served_name: the model's name in requests; None for the last part of its path.
        cache_memory: bytes of packed pages, as people write sizes ("1GiB").
        max_running: requests decoded together.
        max_waiting: requests that wait; more get status 429.
        max_body: bytes of a request's body.
        cors: origins whose pages may ask ("http://localhost:3000", "*" for all).
        piece: tokens of a prompt read between two decode steps.
        prefixes: prompt prefixes kept in memory.
        prefix_folder: folder where prefixes outlast the server; None keeps none.
        prefix_disk: most bytes that they take there.
        drain: seconds for running requests at the end.
    """

    device: str = "cpu"
    dtype: str = "float32"
    served_name: str | None = None
    cache_memory: str = "1GiB"
    max_running: int = 16
    max_waiting: int = 64
    max_body: int = 4 << 20
    cors: tuple[str, ...] = ()
    piece: int = 512
    prefixes: int = 32
    prefix_folder: Path | None = None
    prefix_disk: str = "4GiB"
    drain: int = 30

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Adds every option to a command line, with these defaults."""

        def add(name: str, help: str, type: Callable[[str], Any] = str, **options: Any) -> None:
            default = getattr(cls, name)
            shown = "" if default is None or default == () else f" (default {default})"
            parser.add_argument(f"--{name.replace('_', '-')}", type=type, default=default, help=help + shown, **options)

        add("device", "cpu or cuda")
        add("dtype", "dtype of the weights", choices=("float32", "float16", "bfloat16"))
        add("served_name", "the model's name in requests (default: the last part of --model)")
        add("cache_memory", "memory for packed pages", metavar="SIZE")
        add("max_running", "requests decoded together", positive, metavar="N")
        add("max_waiting", "requests that may wait; further ones get status 429", positive, metavar="N")
        add("max_body", "most bytes of a request's body", positive, metavar="BYTES")
        add("cors", "origin whose pages may ask, * for all; may be given again", action=_Append, metavar="ORIGIN")
        add("piece", "tokens of a prompt read between two steps", positive, metavar="TOKENS")
        add("prefixes", "prompt prefixes kept in memory", int, metavar="N")
        add("prefix_folder", "folder that keeps prefixes after the server ends (default: none)", Path, metavar="FOLDER")
        add("prefix_disk", "most disk space for them", metavar="SIZE")
        add("drain", "time for running requests when the server ends", positive, metavar="SECONDS")

    @classmethod
    def of(cls, args: argparse.Namespace) -> ServerOptions:
        """The options in a parsed command line."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


class _Append(argparse.Action):
    """Collects an option that is given more than once in a tuple."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), values))


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more; got {text}")
    return number
