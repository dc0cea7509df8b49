"""What sparse attention costs SmolLM2: KL to the exact cache and needles, with what is read and dropped.

Every rule runs through the real packed cache. The first half of a text is read as a prompt; its second half, which is
measured, and a prompt's question and answer, in sparse steps of at most eight tokens. The first row is the dense packed
cache in the same steps; `kl_rise` is over it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from forgeattention import models
from forgeattention.codec.presets import DEFAULT, PRESETS
from forgeattention.models.fingerprint import fingerprint
from forgeattention.sparse import Budgets, SparseSpec, sparse_means
from forgeattention.tools.evaluation import kl, niah, texts
from forgeattention.tools.evaluation.commands import SPARSE_TAIL
from forgeattention.tools.evaluation.needles import Outcome
from forgeattention.tools.evaluation.setup import caches
from forgeattention.tools.evaluation.streaming import first_tokens, opened, tokenise
from forgeattention.tools.measure import allot, heatmap, measure
from forgeattention.util.environment import environment

RULES = (
    "dense", "top_p=0.995", "top_p=0.99", "top_k=256", "budgets=head", "budgets=group", "top_k=512", "top_k=128",
    "top_k=1024,fast", "top_k=512,fast", "top_k=256,fast", "top_p=0.99,fast", "top_p=0.95,fast",
)  # fmt: skip


def spec_of(rule: str, budgets: dict[str, str]) -> SparseSpec | None:
    if rule == "dense":
        return None
    name, _, which = rule.partition("=")
    return SparseSpec.parse(f"budgets={budgets[which]}" if name == "budgets" else rule, min_context=0)


def measured_budgets(model: Any, unseen: list[torch.Tensor], options: argparse.Namespace) -> dict[str, str]:
    """Files of budgets of equal mean: of single heads ("head") and of heads that share keys and values ("group")."""
    statistics = measure(model, torch.stack(unseen), [options.length // 4, options.length // 2, options.length])
    longest = {layer: runs[-1] for layer, runs in statistics.items()}
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    files, folder = {}, tempfile.mkdtemp()
    for which, size in (("head", 1), ("group", group)):
        made = Budgets(fingerprint(model), allot(longest, options.top_k, size))
        files[which] = f"{folder}/{which}.json"
        made.save(files[which])
        if options.image and which == "head":
            heatmap(made, longest).savefig(options.image, dpi=120)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="or where it lies")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rules", nargs="+", default=RULES)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--needles", type=int, nargs="*", default=[2000, 4000])
    parser.add_argument("--top-k", type=int, default=256, help="mean of the budgets")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--image", type=Path, help="heatmap of the budgets of single heads")
    options = parser.parse_args()
    model, tokenizer = models.load(options.model, device=options.device)
    pieces = {}
    for name in ("genesis", "licences", "code"):
        ids, first = tokenise(tokenizer, texts.read(name)), first_tokens(tokenizer)
        # Budgets come from the parts of the texts that are not measured.
        need = options.windows * options.length
        pieces[name] = (
            kl.windows(ids[:need], options.length, options.windows, first),
            opened(ids[None, -options.length :], first)[0],
        )
    asked = any(rule.startswith("budgets") for rule in options.rules)
    budgets = measured_budgets(model, [last for _, last in pieces.values()], options) if asked else {}
    rows: list[dict[str, Any]] = []
    spec = PRESETS[DEFAULT]
    for rule in options.rules:
        begun, log = time.time(), list[dict[str, float]]()
        sparse = spec_of(rule, budgets)
        _, make = caches(model, spec, sparse=sparse, sparse_log=log)
        row: dict[str, Any] = {"rule": rule}
        for name, (windows, _) in pieces.items():
            result = kl.compare(model, windows, make, block=8, prompt_block=128, implementation="forge")
            row[f"kl_{name}"], row[f"same_top_{name}"] = result.kl, result.same_top
        row["kl"] = sum(row[f"kl_{name}"] for name in pieces) / len(pieces)
        row["same_top"] = sum(row[f"same_top_{name}"] for name in pieces) / len(pieces)
        row["kl_rise"] = row["kl"] - (rows[0]["kl"] if rows else row["kl"])
        row |= sparse_means(log)
        if log:
            row["share_of_bytes"] = row["bytes_read"] / row["bytes_dense"]
        passed: list[bool] = []
        for test in ("single",) if options.needles else ():
            for document in niah.documents(test, tokenizer, options.needles):
                cells = niah.ask(model, tokenizer, document, make, implementation="forge", tail=SPARSE_TAIL)
                passed += [cell.outcome == Outcome.PASS for cell in cells]
        first = rows[0]["passed"] if rows else passed
        row |= {"passed": passed, "needles": sum(passed), "of": len(passed)}
        row["kept"] = sum(a and b for a, b in zip(passed, first))
        row["seconds"] = time.time() - begun
        rows.append(row)
        print(
            {name: round(x, 5) if isinstance(x, float) else x for name, x in row.items() if name != "passed"},
            flush=True,
        )
        if options.json:
            setting = {"length": options.length, "windows": options.windows, "haystacks": options.needles, "block": 8}
            data = {"rows": rows, "setting": setting, "spec": spec.to_json(), "device": options.device}
            options.json.write_text(json.dumps({**data, "env": environment()}, indent=1))


if __name__ == "__main__":
    main()
