"""Which sparse or evicting setting to take on long contexts: KL at the end of them, and needles.

    python benchmarks/long_choices.py --model FILE.gguf --device cuda --lengths 16000 31000 --json OUT.json

Every rule runs through the real packed cache. A text is read as a prompt; its last tokens, which are measured, are read
in steps of at most eight, as answers are. Needles: five code words of different places in one text ("multi"), whose
questions and answers are read in such steps too.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import journal
import torch
from real_models import identity
from transformers import DynamicCache

from forgeattention import models
from forgeattention.codec.presets import DEFAULT, PRESETS
from forgeattention.eviction import Eviction
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.sparse import SparseSpec
from forgeattention.tools.evaluation import kl, niah, texts
from forgeattention.tools.evaluation.commands import SPARSE_TAIL
from forgeattention.tools.evaluation.needles import Outcome
from forgeattention.tools.evaluation.setup import eviction_report
from forgeattention.tools.evaluation.streaming import first_tokens, tokenise
from forgeattention.util.environment import environment
from forgeattention.util.files import write_json

RULES = ("dense", "top_k=1024,fast", "v3:0.9", "v3:0.9:host", "top_p=0.995", "v3:0.5:host", "v3:0.5", "v3:0.75:host",
         "v3:0.9:host, mean", "v3:0.5:host, mean", "top_k=512,fast", "top_k=256,fast", "v3:0.75", "top_p=0.99",
         "v3:0.75:host, mean")  # fmt: skip
"""Those of most worth first; "mean": pages of all heads are joined by their scores' mean."""
TEXTS = ("genesis", "code")
STEP = 8


def maker(model: Any, rule: str) -> Any:
    """What makes the caches of a rule."""
    options: dict[str, Any] = {}
    if rule.startswith("top_"):
        options["sparse"] = SparseSpec.parse(rule, min_context=0)
    elif rule != "dense":
        setting, _, join = rule.partition(", ")
        eviction = Eviction.parse(setting)
        options["eviction"] = replace(eviction, join=join) if join else eviction
    return lambda: ForgeCache(model, PRESETS[DEFAULT], **options)


def measure(model: Any, tokenizer: Any, rule: str, length: int, last: int, block: int) -> dict[str, Any]:
    """One row."""
    begun, first = time.perf_counter(), first_tokens(tokenizer)
    found, same = [], []
    made: list[Any] = []

    def make() -> Any:
        made.append(maker(model, rule)())
        return made[-1]

    for name in TEXTS:
        ids = tokenise(tokenizer, texts.endless(name, 8 * length))
        pieces = kl.windows(ids, length, 1, first)
        setting: dict[str, Any] = {"block": STEP, "prompt_block": block, "start": length - last}
        result = kl.compare(model, pieces, make, implementation="forge", **setting)
        found.append(result.kl)
        same.append(result.same_top)
    held = made[-1].nbytes / _exact_bytes(model, length)
    evicted = eviction_report(made[-1])
    (document,) = niah.documents("multi", tokenizer, [length - 512])
    made.clear()
    cells = niah.ask(model, tokenizer, document, make, implementation="forge", block=block, tail=SPARSE_TAIL)
    return {
        "rule": rule, "length": length, "kl": sum(found) / len(found), "same_top": sum(same) / len(same),
        "passed": sum(cell.outcome == Outcome.PASS for cell in cells), "of": len(cells), "bytes_of_exact": held,
        "eviction": evicted, "seconds": time.perf_counter() - begun,
    }  # fmt: skip


def _exact_bytes(model: Any, tokens: int) -> float:
    config = model.config.get_text_config(decoder=True)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = len(DynamicCache(config=model.config).layers)
    return 2.0 * layers * config.num_key_value_heads * dim * 2 * tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[16000])
    parser.add_argument("--last", type=int, default=256, help="positions at the end that are measured")
    parser.add_argument("--block", type=int, default=1024, help="tokens of a prompt read at once")
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, tokenizer = models.load(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    done, rows, failed = journal.Journal(args.journal), [], 0
    for length in args.lengths:
        for rule in args.rules:
            name = f"{rule} {length}"
            try:
                row = done.get(name)
                row = row or done.add(name, measure(model, tokenizer, rule, length, args.last, args.block))
            except Exception:  # the others are measured all the same; the exit code says that one is missing
                traceback.print_exc()
                failed += 1
                continue
            rows.append(row)
            print(
                f"{name:30s} KL {row['kl']:.5f}  top {row['same_top']:.1%}  needles {row['passed']} of {row['of']}  "
                f"bytes {row['bytes_of_exact']:.3f} of float16  {row['seconds']:.0f} s",
                flush=True,
            )
    if args.json:
        setting = {"dtype": args.dtype, "device": args.device, "last": args.last, "block": args.block}
        write_json(args.json, {**identity(args.model), "setting": setting, "rows": rows, "env": environment()})
    return failed


if __name__ == "__main__":
    sys.exit(main())
