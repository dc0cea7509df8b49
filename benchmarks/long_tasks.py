"""RULER and needles at any length, cache by cache: samples of one kind and length are answered as one batch.

    python benchmarks/long_tasks.py --model FILE.gguf --device cuda --dtype bfloat16 --tasks ruler --lengths 4096 8192
    python benchmarks/long_tasks.py --model FILE.gguf --device cuda --tasks multi distractors --lengths 16000 32000

Tasks are those of RULER by name, "ruler" for its 13, and the tests of `forgeattn eval niah` (one document a depth, all
of its questions behind one reading). Scores compare caches with one another: `ruler.py` says how the texts differ from
the paper's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import batch_decode
import candidates as caches
import fitted_caches
import journal
import torch
from humaneval import shared_tokens
from real_models import identity

from forgeattention import models
from forgeattention.tools.evaluation import needles, niah, ruler
from forgeattention.util.environment import environment
from forgeattention.util.files import write_json

NEEDLE_TOKENS = 24


@dataclass(frozen=True)
class Question:
    """What is asked at once.

    Attributes:
        prompts: the tokens of every question, int lists.
        answers: what RULER's samples must say, or the hidden needles.
        decoys: wrong answers that a needle's prompt holds.
        hay: the text that answers must not recite.
    """

    task: str
    length: int
    prompts: list[list[int]]
    answers: list[Any]
    new_tokens: int
    decoys: list[tuple[str, ...]] | None = None
    hay: str = ""


_tokenizer: Any


def _start(name: str) -> None:
    global _tokenizer
    from transformers import AutoTokenizer

    _tokenizer = AutoTokenizer.from_pretrained(models.folder(name))


def _ruler(item: tuple[str, int, int]) -> tuple[list[int], tuple[str, ...], int] | None:
    task, length, seed = item
    try:
        sample = ruler.make(task, _tokenizer, length, seed)
    except ValueError:
        return None  # not even the smallest question fits
    return ruler.prompt(_tokenizer, sample)[0].tolist(), sample.answers, sample.max_new_tokens


def _needles(item: tuple[str, int]) -> list[Question]:
    test, length = item
    made = []
    for document in niah.documents(test, _tokenizer, [length]):
        prompts = [niah.prompt(_tokenizer, document.text, x.question)[0].tolist() for _, x in document.asked]
        hidden = [x for _, x in document.asked]
        made.append(Question(test, length, prompts, hidden, NEEDLE_TOKENS, list(document.decoys), document.hay))
    return made


def questions(model: str, tasks: list[str], lengths: list[int], samples: int, workers: int) -> list[Question]:
    """All that is asked, short lengths first; made by so many processes."""
    known = [task for task in tasks if task in ruler.TASKS]
    items = [(task, length, seed) for length in lengths for task in known for seed in range(samples)]
    tests = [(task, length) for length in lengths for task in tasks if task not in ruler.TASKS]
    with multiprocessing.get_context("spawn").Pool(workers, _start, (model,)) as pool:
        hidden = pool.map_async(_needles, tests, chunksize=1)
        made = pool.map(_ruler, items, chunksize=1)
        found = [question for group in hidden.get() for question in group]
    for length in lengths:
        for task in known:
            own = [m for item, m in zip(items, made) if item[:2] == (task, length) and m is not None]
            if own:
                found.append(Question(task, length, [m[0] for m in own], [m[1] for m in own], own[0][2]))
    return sorted(found, key=lambda q: q.length)


def ask(model: Any, tokenizer: Any, question: Question, candidate: Any) -> dict[str, Any]:
    """One row: what a cache scores."""
    prompts = [torch.tensor(prompt) for prompt in question.prompts]
    shared = shared_tokens(prompts) if question.hay and len(prompts) > 1 else 0
    begun = time.perf_counter()
    front, rest = prompts[0][:shared] if shared else None, [p[shared:] for p in prompts]
    new, graph = batch_decode.answers_anyway(model, rest, candidate, question.new_tokens, shared=front)
    said = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in new]
    row: dict[str, Any] = {
        "cache": candidate.name, "bits": candidate.effective_bits, "task": question.task, "length": question.length,
        "of": len(said), "seconds": time.perf_counter() - begun, "graph": graph, "answers": said,
    }  # fmt: skip
    if question.hay:
        decoys = question.decoys or [()] * len(said)
        found = [
            needles.judge(text, hidden, decoys=wrong, hay=question.hay) is needles.Outcome.PASS
            for text, hidden, wrong in zip(said, question.answers, decoys, strict=True)
        ]
        return row | {"passed": sum(found)}
    return row | {"score": ruler.score(question.task, said, question.answers)}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by cache, task and length: questions of one test added up, answers left out."""
    out: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = row["cache"], row["task"], row["length"]
        if key not in out:
            out[key] = {name: value for name, value in row.items() if name != "answers"}
        else:
            for name in ("of", "passed", "seconds"):
                out[key][name] += row[name]
    return list(out.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tasks", nargs="+", default=["ruler"], help="of RULER or of `forgeattn eval niah`")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--samples", type=int, default=20, help="of each of RULER's tasks and lengths")
    parser.add_argument("--only", nargs="+", help="caches of these names, or PART* for all that hold it (default: all)")
    parser.add_argument("--fitted", action="store_true", help="also caches that are fitted to the model by a text")
    parser.add_argument("--workers", type=int, default=8, help="processes that make the questions")
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    tasks = [name for task in args.tasks for name in (ruler.TASKS if task == "ruler" else [task])]
    asked = questions(args.model, tasks, args.lengths, args.samples, args.workers)
    model, tokenizer = models.load(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    every = caches.candidates(model, "field")
    if args.fitted:
        every += fitted_caches.candidates(model, tokenizer)
    done, rows, failed = journal.Journal(args.journal), [], 0
    for number, question in enumerate(asked):
        for candidate in caches.chosen(every, args.only):
            name = f"{candidate.name} {question.task} {question.length} {number}"
            try:
                row = done.get(name) or done.add(name, ask(model, tokenizer, question, candidate))
            except Exception:  # the others are measured all the same; the exit code says that one is missing
                traceback.print_exc()
                failed += 1
                continue
            rows.append(row)
            result = f"{row['passed']} passed" if "passed" in row else f"score {row['score']:.1f}"
            print(f"{name:80s} {result} of {row['of']}  {row['seconds']:.1f} s", flush=True)
    if args.json:
        setting = {"dtype": args.dtype, "device": args.device, "samples": args.samples}
        write_json(
            args.json,
            {**identity(args.model), "setting": setting, "rows": summary(rows), "env": environment()},
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
