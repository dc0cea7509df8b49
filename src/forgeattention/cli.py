"""The command line `forgeattn`: arguments, dispatch and error lines. What a subcommand does is in its own module."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit code: 0, 1 for a failure, 2 for bad input."""
    args = build_parser().parse_args(argv)
    try:
        if args.json is not None and not args.json.parent.is_dir():
            raise ValueError(f"[cli] expected --json in a folder that exists; got {args.json}")
        result = _target(args.target)(args)
        if args.json is not None:
            from .evaluation.report import write_json

            write_json(args.json, result)
    except ValueError as error:
        return _fail(str(error), 2)
    except ImportError as error:
        if (error.name or "").startswith("forgeattention"):
            raise
        return _fail(f"{error}: install it with pip install 'forgeattention[demo]'", 1)
    except (OSError, RuntimeError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; every leaf sets `target`, "module:function", and has `--json`."""
    parser = argparse.ArgumentParser(prog="forgeattn", description="A KV cache in about 3 bits per element.")
    parser.add_argument("--version", action="version", version=f"forgeattn {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    demo = _leaf(commands, "demo", "forgeattention.demo:run", "a model answers from the exact and the packed cache")
    _add_model(demo)
    _add_bits(demo)
    demo.add_argument("--length", type=int, default=2000, help="haystack tokens (default %(default)s)")
    demo.add_argument("--output", type=Path, default=Path("demo"), help="folder of the reports (default %(default)s)")

    generate = _leaf(commands, "generate", "forgeattention.generate:run", "continue a prompt with a packed cache")
    _add_model(generate)
    _add_bits(generate)
    generate.add_argument("prompt", help="what the user says; - reads it from standard input")
    generate.add_argument("--cache", choices=("packed", "exact"), default="packed")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    generate.add_argument("--seed", type=int, default=0)

    bench = _branch(commands, "bench", "measure speed beside the fastest peers")
    decode = _leaf(bench, "decode", "forgeattention.bench:decode", "attention of one new token over a packed context")
    decode.add_argument("--device", default="cpu", help="cpu, cuda or metal (default %(default)s)")
    decode.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768, 131072], metavar="TOKENS")
    decode.add_argument("--batches", type=int, nargs="+", default=[1, 4], metavar="ROWS")
    decode.add_argument("--q-heads", type=int, default=32)
    decode.add_argument("--kv-heads", type=int, default=8)
    decode.add_argument("--head-dim", type=int, default=128)
    decode.add_argument("--threads", type=int, help="default: all cores")
    _add_bits(decode)

    evaluate = _branch(commands, "eval", "measure fidelity against the exact cache")
    kl = _leaf(evaluate, "kl", "forgeattention.evaluation.commands:run_kl", "KL divergence and same top token")
    kl.add_argument("--text", default="genesis", help="shipped text: genesis or licences (default %(default)s)")
    kl.add_argument("--length", type=int, default=2048, help="tokens read in one piece (default %(default)s)")
    kl.add_argument("--windows", type=int, default=2, help="pieces (default %(default)s)")
    kl.add_argument("--block", type=int, default=128, help="tokens read at once (default %(default)s)")
    niah = _leaf(evaluate, "niah", "forgeattention.evaluation.commands:run_niah", "needle in a haystack, strict")
    niah.add_argument("--lengths", type=int, nargs="+", default=[2000], metavar="TOKENS")
    niah.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9], metavar="SHARE")
    niah.add_argument("--block", type=int, default=256, help="tokens read at once (default %(default)s)")
    for leaf in (kl, niah):
        _add_model(leaf)
        _add_bits(leaf)

    models = _branch(commands, "models", "models by name")
    fetch = _leaf(models, "fetch", "forgeattention.cli:fetch", "install a model that is known by name")
    fetch.add_argument("name", help="smollm2")

    _leaf(commands, "doctor", "forgeattention.cli:doctor", "which backends work here, and why the others do not")
    return parser


def fetch(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return where the fetched model is."""
    from .models import fetch as fetch_model

    path = fetch_model(args.name)
    print(f"{args.name}: {path}")
    return {"name": args.name, "path": str(path)}


def doctor(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return what `ops.dispatch` knows of the backends, and the versions."""
    from .evaluation.report import environment
    from .ops import dispatch

    backends = dispatch.report()
    env = environment()
    for row in backends:
        print(f"{row['backend']:<10} {'available' if row['available'] else 'not here':<10} {row['reason']}")
    print(", ".join(f"{name} {version}" for name, version in env["versions"].items()))
    return {"backends": backends, "env": env}


def _target(name: str) -> Callable[[argparse.Namespace], Any]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _fail(message: str, code: int) -> int:
    print(f"forgeattn: {' '.join(message.split())}", file=sys.stderr)
    return code


def _branch(commands: Any, name: str, summary: str) -> Any:
    return commands.add_parser(name, help=summary, description=summary).add_subparsers(metavar="WHAT", required=True)


def _leaf(commands: Any, name: str, target: str, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(target=target)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as JSON")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder, a .gguf file or a hub id")


def _add_bits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--k-bits", type=int, default=3, choices=(2, 3, 4), help="bits per key element (default 3)")
    parser.add_argument("--v-bits", type=int, default=3, choices=(2, 3, 4), help="bits per value element (default 3)")
