"""All that is measured and checked of vLLM with packed caches, in the order of its worth; it can be continued.

    python benchmarks/vllm_suite.py --model FOLDER --out OUT --minutes 10     as much as fits
    python benchmarks/vllm_suite.py --model FOLDER --out OUT --list           the steps and what they take
    python benchmarks/vllm_suite.py --device cpu --shape tiny --out OUT       a trial of every step on a CPU

Every step is a process of its own with a limit of time; a journal in OUT names those that are finished, which do not
run again. A step that fails is told and does not stop the others. OUT/vllm.json has the records of all steps, without
the texts that were compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from journal import Journal, run_step
from vllm_engines import SHAPES

HERE = Path(__file__).parent
CASES = "1x2048+64 32x2048+128 64x8192+128 16x32000+128"
PACKED = "packed-balanced"


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: of the step and its files.
        script: in this folder.
        options: of it.
        seconds: what it takes on an H200 at most; it is ended after half as long again.
        needs: steps whose files it reads.
        gpus: that it runs on.
        sanitizer: tool of compute-sanitizer that it runs under.
    """

    name: str
    script: str
    options: tuple[str, ...]
    seconds: int
    needs: tuple[str, ...] = ()
    gpus: int = 1
    sanitizer: str = ""


def speed(engine: str, seconds: int, graphs: str = "decode", name: str = "", **options: str) -> Step:
    given = {"cases": CASES, "equal": "", **options}
    flat = [x for key, value in given.items() for x in (f"--{key}", value)]
    timeout = ("--timeout", str(seconds))
    return Step(
        name or f"speed-{engine}", "vllm_cuda.py", ("--engines", engine, "--graphs", graphs, *flat, *timeout), seconds
    )


def check(name: str, what: str, *options: str, seconds: int = 60, **fields: Any) -> Step:
    return Step(name, "vllm_checks.py", (what, *options), seconds, **fields)


def compared(name: str, one: str, other: str, what: str = "compare") -> Step:
    return check(name, what, seconds=20, needs=(one, other))


def steps() -> list[Step]:
    """All steps, those of most worth first."""
    equal = {"cases": "", "equal": "160x4096+1024"}
    llama = {"cases": "32x16384+128", "shape": "llama-8b", "memory": "0.6"}
    eager = ("--graphs", "eager")
    sanitized = ("--shape", "tiny", "--length", "1024", "--memory", "0.05", "--new", "66", *eager)
    return [
        speed(PACKED, 120, profile="32x2048+64"),
        speed("own", 90),
        check("texts", "texts", seconds=70),
        check("texts-eager", "texts", *eager, seconds=70),
        compared("graphs-on-off", "texts-eager", "texts"),
        speed(PACKED, 90, name="equal-packed-balanced", **equal),
        speed("own", 120, name="equal-own", **equal),
        check("counts", "counts", seconds=50),
        check("counts-own", "counts", "--engine", "own", seconds=50),
        check("alone", "alone", seconds=60),
        check("load", "load", "--requests", "256", seconds=90),
        check("pool", "pool", seconds=50),
        check("prefix", "prefix", seconds=50),
        speed("packed-small", 90),
        check("texts-again", "texts", seconds=70),
        compared("restarted", "texts", "texts-again"),
        check("texts-transformers", "transformers", seconds=150),
        compared("like-transformers", "texts", "texts-transformers"),
        speed("own-fp8", 90),
        speed(PACKED, 150, name="llama-8b-packed-balanced", **llama),
        speed("own", 150, name="llama-8b-own", **llama),
        check("logprobs-own", "logprobs", "--engine", "own", seconds=60),
        *(
            step
            for window in (0, 64, 128)
            for step in (
                check(f"logprobs-{window}", "logprobs", "--window", str(window), seconds=60),
                compared(f"kl-{window}", "logprobs-own", f"logprobs-{window}", "kl"),
            )
        ),
        check("memcheck", "texts", *sanitized, seconds=150, sanitizer="memcheck"),
        speed("own-turboquant_3bit_nc", 90),
        speed("own-turboquant_4bit_nc", 90),
        speed(PACKED, 180, "compiled", f"compiled-{PACKED}"),
        speed("own", 180, "compiled", "compiled-own"),
        check("texts-compiled", "texts", "--graphs", "compiled", seconds=150),
        compared("compiled-or-not", "texts", "texts-compiled"),
        check("texts-piecewise", "texts", "--graphs", "piecewise", seconds=150),
        compared("piecewise-or-not", "texts", "texts-piecewise"),
        check("sleep", "sleep", seconds=60),
        check("texts-2-gpus", "texts", "--ranks", "2", seconds=120, gpus=2),
        compared("one-or-two-gpus", "texts", "texts-2-gpus"),
        speed("own", 90, "eager", "eager-own"),
        speed(PACKED, 90, "eager", f"eager-{PACKED}"),
        speed("own-fp8", 90, name="equal-own-fp8", **equal),
        speed("packed-small", 90, name="equal-packed-small", **equal),
    ]


TRIAL = ("--length", "1024", "--memory", "0.1")
TRIAL_OF = {
    "vllm_cuda.py": ("--cases", "2x200+8", "--equal", "", "--profile", ""),
    "vllm_checks.py": ("--new", "8", "--requests", "12", "--pool", "60"),
}
"""Options of a trial, behind those of the step."""
ONLY_CUDA = {"own-fp8": "the CPU engine has no fp8 cache", "own-turboquant": "TurboQuant is written in Triton"}


def command(step: Step, args: argparse.Namespace) -> list[str]:
    """The step's command line."""
    own = [f"--{key}" for key in ("model", "shape") if f"--{key}" not in step.options and getattr(args, key)]
    given = [x for name in own for x in (name, getattr(args, name[2:]))]
    files = [str(args.out / f"{name}.json") for name in step.needs]
    first = [step.options[0], *files, *step.options[1:]] if files else list(step.options)
    line = [args.python, str(HERE / step.script), *first, *given, "--device", args.device]
    if step.script == "vllm_cuda.py":
        line += ["--python", args.python]
    if args.device == "cpu":
        line += [*TRIAL, *TRIAL_OF[step.script]]
    if step.sanitizer and args.device == "cuda":
        line = [
            "compute-sanitizer",
            "--report-api-errors",
            "no",
            "--error-exitcode",
            "9",
            "--tool",
            step.sanitizer,
            *line,
        ]
    return [*line, "--json", str(args.out / f"{step.name}.json")]


def left_out(step: Step, args: argparse.Namespace) -> str:
    """Why a step cannot run here, or nothing."""
    if step.gpus > args.gpus:
        return f"needs {step.gpus} GPUs"
    if args.device == "cpu":
        said = [why for engine, why in ONLY_CUDA.items() if any(x.startswith(engine) for x in step.options)]
        if said or step.name == "sleep":
            return said[0] if said else "the CPU engine has no sleep mode"
        if step.script == "vllm_checks.py" and step.options[0] == "transformers" and args.shape:
            return "a random shape has no weights to load"
    elif step.sanitizer and shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not on the path"
    missing = [name for name in step.needs if not (args.out / f"{name}.json").is_file()]
    return f"{missing[0]} has not run" if missing else ""


def run(step: Step, args: argparse.Namespace, journal: Journal, until: float) -> None:
    """Runs one step, unless it is done or there is no time."""
    if journal.get(step.name):
        return
    left = until - time.time()
    why = left_out(step, args) or ("" if left >= min(30, step.seconds) else "no time is left")
    if why:
        print(f"{step.name}: left out, {why}", flush=True)
        return
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if step.sanitizer else None
    limit = min(left, 1.5 * step.seconds if args.device == "cuda" else 600)
    run_step(journal, step.name, command(step, args), args.out / f"{step.name}.log", limit, environment)


def merged(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of all steps that have left some; of versions and machine once."""
    records: list[dict[str, Any]] = []
    for step in steps():
        file = args.out / f"{step.name}.json"
        for record in json.loads(file.read_text()) if file.is_file() else ():
            if record["op"] != "env":
                kept = {key: value for key, value in record.items() if key not in ("said", "likely")}
                records.append({"step": step.name, **kept})
            elif not records:
                records.append(record)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder of a model")
    parser.add_argument("--shape", default="", choices=["", *SHAPES], help="random weights of this shape")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: every step, small and eager")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has vLLM")
    parser.add_argument("--only", nargs="+", help="steps whose name starts so")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if not args.model and not args.shape:
        parser.error("expected --model or --shape")
    every = [step for step in steps() if not args.only or step.name.startswith(tuple(args.only))]
    if args.list:
        for step in every:
            print(f"{step.seconds:5d} s  {step.name}: {' '.join(command(step, args)[1:])}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    journal, until = Journal(args.out / "suite.jsonl"), time.time() + 60 * args.minutes
    for step in every:
        run(step, args, journal, until)
        (args.out / "vllm.json").write_text(json.dumps(merged(args), indent=1))
    failed = [step.name for step in every if not journal.get(step.name) and not left_out(step, args)]
    if failed:
        sys.exit(f"not finished: {', '.join(failed)}")


if __name__ == "__main__":
    main()
