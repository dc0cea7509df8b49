"""Long greedy answers of every cache: do they repeat themselves, how long are they the exact cache's, how likely are
they under the exact model?

    python benchmarks/long_decode.py --model FILE.gguf --device cuda --json OUT.json      20 prompts, 2,048 new tokens
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path
from typing import Any

import batch_decode
import candidates as caches
import journal
import torch
from fidelity_measure import documents
from real_models import identity

from forgeattention import models
from forgeattention.util.environment import environment
from forgeattention.util.files import write_json

TEXTS = ("genesis", "licences", "code", "json")
PROMPT_TOKENS = 600
AGREEMENT = 1000
RUN = 4


def first_other(answer: list[int], exact: list[int]) -> int:
    """The first place where two answers differ; their length if nowhere."""
    return next((i for i, (a, b) in enumerate(zip(answer, exact)) if a != b), min(len(answer), len(exact)))


def repetition(answer: list[int], run: int = RUN) -> float:
    """Share of the runs of `run` tokens that stood in the answer before, in [0, 1]."""
    runs = [tuple(answer[i : i + run]) for i in range(len(answer) - run + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


@torch.no_grad()
def likelihood(model: Any, prompt: torch.Tensor, answer: list[int]) -> float:
    """Mean log-likelihood of an answer's tokens under the model with its exact states, nats."""
    ids = torch.cat([prompt, torch.tensor(answer)])[None].to(model.device)
    logits = model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
    return float(logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).double().mean())


def measure(model: Any, prompts: list[torch.Tensor], candidate: Any, count: int, exact: Any) -> dict[str, Any]:
    """One cache; `exact`: the exact cache's answers, None if these are they."""
    answers, graph = batch_decode.answers_anyway(model, prompts, candidate, count, stop=False)
    same = [first_other(a, b) for a, b in zip(answers, answers if exact is None else exact, strict=True)]
    agreed = min(AGREEMENT, count)
    mean = [sum(x) / len(x) for x in (
        [min(n, agreed) for n in same],
        [repetition(answer) for answer in answers],
        [likelihood(model, prompt, answer) for prompt, answer in zip(prompts, answers)],
    )]  # fmt: skip
    return {
        "cache": candidate.name, "bits": candidate.effective_bits, "task": "long decode", "length": count,
        "of": len(answers), "first_other": same, "agreement": mean[0] / agreed, "repetition": mean[1],
        "log_likelihood": mean[2], "graph": graph, "answers": answers,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=2048)
    parser.add_argument("--only", nargs="+", help="caches of these names, or PART* for all that hold it (default: all)")
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = models.load(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    each = -(-args.prompts // len(TEXTS))
    pieces = documents(tokenizer, each, PROMPT_TOKENS, TEXTS)
    prompts = [piece for name in TEXTS for piece in pieces[name]][: args.prompts]
    done, rows, failed = journal.Journal(args.journal), [], 0
    chosen = caches.chosen(caches.candidates(model, "field"), args.only and ["exact", *args.only])
    for candidate in chosen:
        try:
            exact = rows[0]["answers"] if rows else None
            row = done.get(candidate.name)
            row = row or done.add(candidate.name, measure(model, prompts, candidate, args.new_tokens, exact))
        except Exception:  # the others are measured all the same; the exit code says that one is missing
            traceback.print_exc()
            failed += 1
            continue
        rows.append(row)
        print(
            f"{row['cache']:44s} {row['bits']:7.4f} bits  agreement {row['agreement']:.3f}  repetition "
            f"{row['repetition']:.3f}  log-likelihood {row['log_likelihood']:.4f}",
            flush=True,
        )
    if args.json:
        kept = [{name: value for name, value in row.items() if name != "answers"} for row in rows]
        setting = {"dtype": args.dtype, "device": args.device, "new_tokens": args.new_tokens}
        write_json(args.json, {**identity(args.model), "setting": setting, "rows": kept, "env": environment()})
    return failed


if __name__ == "__main__":
    sys.exit(main())
