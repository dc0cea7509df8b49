"""The command line `forgeattn`: arguments, dispatch and error lines. What a subcommand does is in its own module."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..codec.presets import DEFAULT, PRESETS
from .serve import ENGINES
from .serve import add_arguments as add_serve_arguments

SELFTESTS = ("ops", "decode", "needles", "generation")
TESTS = ("single", "multi", "varied", "distractors", "qa", "kinds")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit code: 0, 1 for a failure, 2 for bad input."""
    parser = build_parser()
    args, others = parser.parse_known_args(argv)
    if others and not getattr(args, "passes_on", False):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    args.arguments = others
    try:
        if args.json is not None and not args.json.parent.is_dir():
            raise ValueError(f"[cli] expected --json in a folder that exists; got {args.json}")
        result = _target(args.target)(args)
        if args.json is not None:
            from ..util.files import write_json

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

    demo = _leaf(commands, "demo", "demo:run", "a model answers from the exact and the packed cache")
    _add_model(demo)
    _add_bits(demo)
    demo.add_argument("--length", type=int, default=2000, help="tokens of the text to read (default %(default)s)")
    demo.add_argument("--output", type=Path, default=Path("demo"), help="folder for the report (default %(default)s)")

    generate = _leaf(commands, "generate", "generate:run", "continue a prompt with a packed cache")
    _add_model(generate)
    _add_bits(generate)
    generate.add_argument("prompt", help="the user's message; - reads it from standard input")
    generate.add_argument("--engine", choices=("hf", "mlx"), default="hf", help="transformers or mlx-lm (default hf)")
    generate.add_argument("--cache", choices=("packed", "exact"), default="packed")
    generate.add_argument(
        "--prompt-cache",
        metavar="FILE",
        help="mlx: continue the conversation in this file if it exists, and save it there",
    )
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    generate.add_argument("--seed", type=int, default=0)

    chat = _leaf(commands, "chat", "chat:run", "chat in the terminal by mlx-lm, with a packed cache")
    _add_model(chat)
    _add_bits(chat)
    chat.set_defaults(passes_on=True)
    chat.epilog = "Every other option goes to mlx_lm.chat: see `mlx_lm.chat --help`."

    serve = _branch(commands, "serve", "an OpenAI-compatible server with packed caches", "ENGINE")
    for engine, (_, _, whose) in ENGINES.items():
        leaf = _leaf(serve, engine, "serve:run", whose)
        leaf.set_defaults(engine=engine)
        _add_model(leaf)
        _add_bits(leaf)
        leaf.add_argument("--host", default="127.0.0.1", help="(default %(default)s)")
        leaf.add_argument("--port", type=int, default=8080, help="0 takes a free one (default %(default)s)")
        add_serve_arguments(engine, leaf)

    ahead = _branch(commands, "compile", "compile CUDA kernels before they are needed; no GPU is needed", "ENGINE")
    leaf = _leaf(ahead, "vllm", "compile:run_vllm", "what vLLM's steps launch for a model, into the cache folder")
    leaf.add_argument("--model", default="smollm2", help="smollm2, a folder, a hub id or a config.json")
    _add_bits(leaf)
    leaf.add_argument("--arch", metavar="SM", help="of the GPU, such as sm_90a (default: this machine's)")
    leaf.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16", help="(default %(default)s)")
    leaf.add_argument("--block-size", type=int, default=64, help="vLLM's (default %(default)s)")
    leaf.add_argument("--tensor-parallel-size", type=int, default=1, help="vLLM's (default %(default)s)")
    leaf.add_argument("--drafts", type=int, default=0, metavar="N", help="speculative tokens of a step (default 0)")
    leaf.add_argument("--no-fit", action="store_true", help="for the setting fit: false")

    bench = _branch(commands, "bench", "measure speed beside the fastest peers")
    decode = _leaf(bench, "decode", "bench.decode:run", "attention of one new token over a packed context")
    decode.add_argument("--device", default="cpu", help="cpu, cuda or metal (default %(default)s)")
    decode.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768, 131072], metavar="TOKENS")
    decode.add_argument("--batches", type=int, nargs="+", default=[1, 4], metavar="ROWS")
    decode.add_argument("--q-heads", type=int, default=32)
    decode.add_argument("--kv-heads", type=int, default=8)
    decode.add_argument("--head-dim", type=int, default=128)
    decode.add_argument("--threads", type=int, help="default: all cores")
    decode.add_argument(
        "--tune", action="store_true", help="metal: try every plan on these shapes and keep the fastest for later runs"
    )
    _add_bits(decode)

    page = _leaf(bench, "report", "bench.report:run", "the records of bench decode as a page")
    page.add_argument("records", type=Path, help="a file of bench decode --json")
    page.add_argument("--output", type=Path, default=Path("bench.html"), help="the page (default %(default)s)")

    _add_eval(_branch(commands, "eval", "measure the packed cache beside the exact one"))

    plan = _leaf(commands, "plan", "plan:run", "the longest context that fits into a memory size")
    plan.add_argument(
        "--model", default="smollm2", help="smollm2, a folder, a hub id or a config.json; reads no weights"
    )
    plan.add_argument(
        "--memory", metavar="SIZE",
        help="memory for weights and cache: 12GB, 12GiB or a machine, 'apple 16GB'; default: a table of machines",
    )  # fmt: skip
    plan.add_argument(
        "--engine",
        choices=("hf", "mlx"),
        help="which engine runs the model (default hf, or mlx where torch is missing)",
    )
    plan.add_argument("--weight-bits", type=float, help="bits per weight, scales included; default: the config's")
    _add_bits(plan)

    page = _leaf(commands, "report", "evaluation.commands_report:run", "one page about a model's cache")
    _add_model(page)
    _add_bits(page)
    _add_machine(page)
    page.add_argument("--output", type=Path, default=Path("report"), help="folder of the report (default %(default)s)")
    parts = ("niah", "kl", "memory", "speed")
    page.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="what to measure (default all)")
    page.add_argument(
        "--test", nargs="+", default=["single"], choices=TESTS, help="kinds of needle test (default single)"
    )
    page.add_argument(
        "--lengths", type=int, nargs="+", default=[500, 1000, 2000], metavar="TOKENS", help="lengths of the haystacks"
    )
    page.add_argument(
        "--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9], metavar="SHARE", help="depths of the needles"
    )
    page.add_argument("--text", default="genesis", help="text for KL: genesis, licences, code or a text file")
    page.add_argument("--kl-length", type=int, default=2048, metavar="TOKENS", help="tokens read for KL")
    page.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048, 4096], metavar="TOKENS")
    for name in ("sparse", "eviction", "ruler", "induction"):
        page.add_argument(f"--{name}", type=Path, metavar="FILE", help="JSON of an earlier run, shown on the page")
    page.add_argument(
        "--results", type=Path, nargs="+", metavar="FILE",
        help="measure nothing: a page for each model that these files of benchmarks/ are of",
    )  # fmt: skip
    page.set_defaults(default_of=page.get_default)

    calibrate = _leaf(commands, "calibrate", "calibrate:run", "move bits between a model's layers, once per model")
    _add_model(calibrate)
    calibrate.add_argument("--out", type=Path, required=True, metavar="FILE", help="the safetensors file to write")
    calibrate.add_argument("--preset", default=DEFAULT, choices=tuple(PRESETS))
    calibrate.add_argument("--bits", type=float, help="budget in effective bits per element (default: the preset's)")
    calibrate.add_argument(
        "--text",
        default="licences",
        help="text to read: licences, genesis, code, random or a text file (default %(default)s)",
    )
    calibrate.add_argument("--tokens", type=int, default=1024, help="tokens to read (default %(default)s)")
    calibrate.add_argument(
        "--sparse",
        action="store_true",
        help="measure attention per head instead, and write a JSON file of budgets to --out",
    )
    calibrate.add_argument(
        "--top-k", type=int, default=256, help="sparse: tokens that a head keeps on average (default %(default)s)"
    )
    calibrate.add_argument(
        "--windows", type=int, default=2, help="sparse: number of pieces of each text (default %(default)s)"
    )
    calibrate.add_argument(
        "--every-head", action="store_true", help="sparse: a budget for each query head, not for each KV head"
    )
    calibrate.add_argument(
        "--image", type=Path, metavar="FILE", help="sparse: draw the budgets, layers by heads, as a PNG"
    )
    calibrate.add_argument("--seed", type=int, default=0)
    calibrate.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")

    models = _branch(commands, "models", "models by name")
    fetch = _leaf(models, "fetch", "cli:fetch", "download a model that has a short name")
    fetch.add_argument("name", help="smollm2")

    check = _leaf(
        commands,
        "selftest",
        "selftest:run",
        "check results and speed on this machine, and write a report; under 10 minutes",
    )
    _add_model(check)
    check.add_argument(
        "--device", choices=("auto", "metal", "cuda", "mlx", "cpu"), default="auto",
        help="auto takes MLX's GPU, else torch's, else the CPU",
    )  # fmt: skip
    check.add_argument("--output", type=Path, default=Path("selftest"), help="folder for the report (default selftest)")
    check.add_argument(
        "--steps", nargs="+", choices=tuple(SELFTESTS), default=list(SELFTESTS), help="what to check (default all)"
    )
    check.add_argument("--quick", action="store_true", help="one codec and small shapes: a minute on two cores")

    _leaf(commands, "doctor", "cli:doctor", "which backends work here, and why the others do not")
    return parser


def _add_eval(evaluate: Any) -> None:
    kl = _leaf(evaluate, "kl", "evaluation.commands:run_kl", "KL divergence, same top token, perplexity")
    ppl = _leaf(evaluate, "ppl", "evaluation.commands:run_kl", "perplexity; the same run as kl")
    for leaf in (kl, ppl):
        leaf.add_argument(
            "--text", default="genesis", help="genesis, licences, code or a text file (default %(default)s)"
        )
        leaf.add_argument("--length", type=int, default=2048, help="tokens of a piece (default %(default)s)")
        leaf.add_argument("--windows", type=int, default=2, help="number of pieces (default %(default)s)")
        leaf.add_argument("--block", type=int, default=128, help="tokens read per forward call (default %(default)s)")
        leaf.add_argument("--start", type=int, help="first position measured (default: half of a piece)")
        leaf.add_argument(
            "--parts",
            type=int,
            default=4,
            help="ranges of positions that are reported separately (default %(default)s)",
        )
        leaf.add_argument(
            "--layers", action="store_true", help="also measure the error of every layer's attention output"
        )

    niah = _leaf(
        evaluate,
        "niah",
        "evaluation.commands:run_niah",
        "find sentences that are hidden in long texts, judged strictly",
    )
    niah.add_argument(
        "--test", nargs="+", default=["single"], choices=(*TESTS, "ramp"), help="kinds of test (default single)"
    )
    niah.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[2000],
        metavar="TOKENS",
        help="lengths of the haystacks (default 2000)",
    )
    niah.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9], metavar="SHARE")
    niah.add_argument(
        "--haystack",
        default="licences",
        help="licences, genesis, code, json, table, mixed or a text file (default licences)",
    )
    niah.add_argument(
        "--needle", metavar="TEXT", help="code word and number, or a sentence with --question and --answer"
    )
    niah.add_argument("--question", metavar="TEXT", help="the question about your own --needle")
    niah.add_argument("--answer", metavar="TEXT", help="the part of your --needle that the answer must contain")
    niah.add_argument("--seed", type=int, default=0, help="seed of the needles and texts (default %(default)s)")
    niah.add_argument(
        "--longest", type=int, metavar="TOKENS", help="ramp: the longest context (default: the model's limit)"
    )
    niah.add_argument("--memory", metavar="SIZE", help="ramp: memory for weights and cache (default: what is free)")

    ruler = _leaf(evaluate, "ruler", "evaluation.commands_synthetic:run_ruler", "RULER's 13 tasks")
    ruler.add_argument("--tasks", nargs="+", metavar="TASK", help="niah_single_1 ... qa_2 (default: all 13)")
    ruler.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[2048],
        metavar="TOKENS",
        help="lengths of the contexts (default 2048)",
    )
    ruler.add_argument("--samples", type=int, default=5, help="samples per task and length (default %(default)s)")
    ruler.add_argument("--seed", type=int, default=0)

    induction = _leaf(
        evaluate, "induction", "evaluation.commands_synthetic:run_induction",
        "a constructed model that retrieves at any length, from the packed cache",
    )  # fmt: skip
    induction.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384], metavar="TOKENS")
    induction.add_argument("--head-dim", type=int, default=128, choices=(64, 128))
    induction.add_argument("--needles", type=int, default=16, help="hidden pairs (default %(default)s)")
    induction.add_argument(
        "--twin", type=float, default=0.8, help="cosine between each key and its distractor (default 0.8)"
    )
    induction.add_argument("--seed", type=int, default=0)
    induction.add_argument("--no-exact", action="store_true", help="do not run the exact cache")

    for leaf in (kl, ppl, niah):
        leaf.add_argument(
            "--sparse",
            metavar="RULE",
            help="tokens that decode steps read: top_k=N, top_p=P or budgets=FILE, with ,fast for page means",
        )
        leaf.add_argument(
            "--sparse-min",
            type=int,
            default=0,
            metavar="TOKENS",
            help="packed tokens below which steps stay dense (default 0)",
        )
    for leaf in (niah, ruler):
        leaf.add_argument("--block", type=int, default=256, help="tokens read per forward call (default %(default)s)")
    niah.add_argument("--max-new-tokens", type=int, default=24, help="most tokens of an answer (default %(default)s)")
    induction.add_argument("--block", type=int, default=2048, help="tokens read per forward call (default %(default)s)")
    for leaf in (kl, ppl, niah):
        leaf.add_argument(
            "--evict", metavar="POLICY:SHARE[:WHERE]",
            help="evict pages: v1, v2, v3, random or recency with the share to keep, or window:TOKENS; drop them, or "
            "move them to host or disk (v3:0.9:host)",
        )  # fmt: skip
    for leaf in (kl, ppl, niah, ruler):
        _add_model(leaf)
    for leaf in (kl, ppl, niah, ruler, induction):
        _add_bits(leaf)
        _add_machine(leaf)


def fetch(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return where the fetched model is."""
    from ..models import fetch as fetch_model

    path = fetch_model(args.name)
    print(f"{args.name}: {path}")
    return {"name": args.name, "path": str(path)}


def doctor(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return what `ops.registry` knows of the backends, and the versions."""
    from ..backends.cpu import native
    from ..ops import registry
    from ..ops.threads import get_num_threads
    from ..util.environment import environment

    backends = registry.report()
    env = environment()
    for row in backends:
        print(f"{row['backend']:<10} {'available' if row['available'] else 'not here':<10} {row['reason']}")
        if row["lacks"]:
            print(f"{'':<21} lacks {', '.join(row['lacks'])}")
    if registry.status("cpu")[0]:
        whose = "PyTorch's" if native.shares_torch_threads() else "this package's own"
        print(f"CPU kernels run on {get_num_threads()} threads, {whose}")
    print(", ".join(f"{name} {version}" for name, version in env["versions"].items()))
    return {"backends": backends, "env": env}


def _target(name: str) -> Callable[[argparse.Namespace], Any]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _fail(message: str, code: int) -> int:
    print(f"forgeattn: {' '.join(message.split())}", file=sys.stderr)
    return code


def _branch(commands: Any, name: str, summary: str, what: str = "WHAT") -> Any:
    return commands.add_parser(name, help=summary, description=summary).add_subparsers(metavar=what, required=True)


def _leaf(commands: Any, name: str, target: str, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(target=f"forgeattention.tools.{target}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as JSON")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder, a .gguf file or a hub id")


def _add_bits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=tuple(PRESETS), help=f"how the cache is coded (default {DEFAULT})")
    parser.add_argument("--k-bits", type=int, choices=(2, 3, 4), help="bits per key element instead of the preset's")
    parser.add_argument("--v-bits", type=int, choices=(2, 3, 4), help="bits per value element instead of the preset's")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="dtype of the weights (default float32)"
    )
    parser.add_argument("--backend", default="auto", help="kernels: auto, cpu, cuda, metal or reference (default auto)")
