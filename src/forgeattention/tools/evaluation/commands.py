"""The subcommands below `forgeattn eval`."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

from ...cache import STEP_TOKENS
from ...util.environment import environment
from ...util.progress import progress
from . import kl, memory, niah, texts
from .needles import Fact, Hidden, Needle, Outcome
from .setup import Setup, eviction_report, eviction_summary, setup
from .streaming import first_tokens, tokenise

RAMP_DEPTHS = (0.1, 0.5, 0.9)
SPARSE_TAIL = 64
"""Last tokens of a prompt, the question, that sparse caches read in small steps, as they read their own answer."""


def run_kl(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return KL, same-top-token share and perplexity of the packed cache, by position, and each layer's
    error, over a text."""
    made = setup(args)
    ids = tokenise(made.tokenizer, texts.read(args.text))
    pieces = kl.windows(ids, args.length, args.windows, first_tokens(made.tokenizer))
    candidates: list[Any] = []
    evicted: list[dict[str, Any] | None] = []

    def make() -> Any:
        candidates.append(made.make_packed())
        return candidates[-1]

    def read() -> None:
        evicted.append(eviction_report(candidates.pop()))
        advance()

    # Only steps of few tokens are sparse; what comes before the measured positions is read as a prompt.
    block = args.block if made.sparse is None else min(args.block, STEP_TOKENS)
    with progress("Reading with both caches", args.windows) as advance:
        result = kl.compare(
            made.model, pieces, make, block=block, prompt_block=args.block, start=args.start,
            parts=args.parts, implementation="forge", on_window=read,
        )  # fmt: skip
    print(
        f"{args.text}, {result.positions} positions, {made.bits:.3f} bits per element: KL {result.kl:.4f} nats, same "
        f"top token {result.same_top:.1%}, perplexity {result.perplexity:.3f} (exact {result.exact_perplexity:.3f})"
    )
    for part in result.parts:
        print(
            f"  positions {part.start:>6} to {part.stop:>6}: KL {part.kl:.4f}, same top token {part.same_top:.1%}, "
            f"perplexity {part.perplexity:.3f} (exact {part.exact_perplexity:.3f})"
        )
    if args.evict:
        print(eviction_summary(args.evict, [found for found in evicted if found is not None]))
    layers = []
    if args.layers:
        from .layers import attention_errors

        errors = attention_errors(made.model, pieces[:1], made.make_packed, block=block, implementation="forge")
        layers = [{"layer": error.layer, "error": error.error} for error in errors]
        for row in layers:
            print(f"  layer {row['layer']:>3}: attention output error {row['error']:.4f}")
    return {
        "kl": result.kl,
        "same_top": result.same_top,
        "effective_bits": made.bits,
        "positions": result.positions,
        "perplexity": result.perplexity,
        "exact_perplexity": result.exact_perplexity,
        "parts": [vars(part) for part in result.parts],
        "layers": layers,
        "evict": args.evict,
        "eviction": evicted if args.evict else None,
        "text": args.text,
        "block": block,
        "model": args.model,
        "spec": made.spec.to_json(),
        **made.sparse_result(),
        "env": environment(),
    }


def run_niah(args: argparse.Namespace) -> dict[str, Any]:
    """Ask the questions of the chosen tests of the exact and of the packed cache; print and return every outcome."""
    made = setup(args)
    needle = needle_from(args.needle, args.question, args.answer)
    rows = []
    with progress("Asking for needles", _questions(args)) as advance:
        for test in args.test:
            for document in _documents(test, made, args, needle):
                setting: dict[str, Any] = {"block": args.block, "max_new_tokens": args.max_new_tokens}
                if made.sparse is not None:
                    setting["tail"] = SPARSE_TAIL
                exact = niah.ask(made.model, made.tokenizer, document, made.make_exact, **setting)
                packed = niah.ask(
                    made.model, made.tokenizer, document, made.make_packed, implementation="forge", **setting
                )
                for one, other in zip(exact, packed, strict=True):
                    rows.append((test, one, other))
                    advance()
    result = niah_result(rows)
    for cell in result["cells"]:
        print(
            f"{cell['test']:<12} {cell['haystack']:<10} {cell['length']:>8} tokens, depth {cell['depth']:.2f}: "
            f"exact {cell['exact']}, packed {cell['packed']}"
        )
    print(
        f"exact {result['exact_pass']}/{result['of']}, packed {result['packed_pass']}/{result['of']} at "
        f"{made.bits:.3f} bits per element; kept {result['kept']} of the {result['exact_pass']} "
        "that the exact cache finds"
    )
    if args.evict:
        print(eviction_summary(args.evict, [cell["eviction"] for cell in result["cells"]]))
    return {
        **result,
        **made.sparse_result(),
        "effective_bits": made.bits,
        "evict": args.evict,
        "model": args.model,
        "spec": made.spec.to_json(),
        "env": environment(),
    }


def niah_result(rows: list[tuple[str, niah.Cell, niah.Cell]]) -> dict[str, Any]:
    """What `eval niah --json` says of questions asked of both caches.

    Args:
        rows: test, the exact cache's cell and the packed cache's.

    Returns:
        `cells`; `exact_pass`, `packed_pass`; `kept`, how many the packed cache finds of those that the exact one finds;
        `of`, all questions; the same four counts by test in `tests`.
    """
    cells = [
        {
            "test": test,
            "haystack": one.haystack,
            "length": one.length,
            "depth": one.depth,
            "needle": one.needle.sentence,
            "answer": one.needle.answer,
            "exact": one.outcome.value,
            "packed": other.outcome.value,
            "exact_text": one.reply.text,
            "packed_text": other.reply.text,
            "prompt_tokens": other.reply.prompt_tokens,
            "exact_bytes": one.cache_bytes,
            "packed_bytes": other.cache_bytes,
            "eviction": other.eviction,
        }
        for test, one, other in rows
    ]

    def count(of: list[dict[str, Any]]) -> dict[str, int]:
        exact = [cell["exact"] == Outcome.PASS for cell in of]
        packed = [cell["packed"] == Outcome.PASS for cell in of]
        both = sum(a and b for a, b in zip(exact, packed))
        return {"exact_pass": sum(exact), "packed_pass": sum(packed), "kept": both, "of": len(of)}

    tests = list(dict.fromkeys(cell["test"] for cell in cells))
    return {
        "cells": cells,
        **count(cells),
        "tests": {test: count([cell for cell in cells if cell["test"] == test]) for test in tests},
    }


def needle_from(text: str | None, question: str | None, answer: str | None) -> Hidden:
    """The needle of the command line.

    Args:
        text: a code word and number ("GREEN DOOR 4411"), a code word, or the sentence "The secret code word is ...";
            with a question, any sentence. None is PURPLE ELEPHANT 7742.
        question, answer: both or neither.

    Raises:
        ValueError: another sentence without its question and answer, or an answer that the sentence does not hold.
    """
    if (question is None) != (answer is None) or (question is not None and text is None):
        raise ValueError("[niah] expected --needle, --question and --answer together; got only some of them")
    if text is None:
        return Needle()
    text = text.strip()
    if question is not None and answer is not None:
        if not answer.strip() or answer not in text:
            raise ValueError(f"[niah] expected an answer that the needle holds; got {answer!r}")
        return Fact(text, question, answer)
    if match := re.fullmatch(r"The secret code word is (.+?)\.?", text):
        text = match[1]
    if not text or text[-1] in ".!?" or "\n" in text:
        raise ValueError(f"[niah] expected a code word, or a sentence with --question and --answer; got {text!r}")
    match = re.fullmatch(r"(.*\S)\s+(\d+)", text)
    return Needle(match[1], match[2]) if match else Needle(text, "")


def _questions(args: argparse.Namespace) -> int:
    each = {"multi": 5, "qa": 5, "varied": len(niah.VARIED) * len(args.depths), "kinds": 3 * len(args.depths)}
    return len(args.lengths) * sum(each.get(test, len(args.depths)) for test in args.test)


def _documents(test: str, made: Setup, args: argparse.Namespace, needle: Hidden) -> Iterator[niah.Document]:
    setting: dict[str, Any] = {"haystack": args.haystack, "needle": needle, "seed": args.seed}
    if test != "ramp":
        return niah.documents(test, made.tokenizer, args.lengths, depths=args.depths, **setting)
    longest = getattr(made.model.config.get_text_config(), "max_position_embeddings", None) or 2**30
    limit = min(args.longest or longest, longest - args.max_new_tokens - 256)
    lengths = niah.ramp(min(args.lengths), limit, _fits(made, args.memory))
    setting["haystack"] = "mixed"
    each = (niah.documents("single", made.tokenizer, [n], depths=RAMP_DEPTHS, **setting) for n in lengths)
    return itertools.chain.from_iterable(each)


def _fits(made: Setup, size: str | None) -> Callable[[int], bool]:
    """Whether both caches of so many tokens fit into the memory given, or into what this machine has free now."""
    from .. import plan

    shape = plan.inspect(made.model.config)
    room = memory.available(made.model.device) if size is None else plan.parse_memory(size) - shape.weight_bytes
    itemsize = made.model.dtype.itemsize / shape.itemsize

    def fits(tokens: int) -> bool:
        held = max(shape.exact_bytes(tokens), shape.packed_bytes(tokens, made.spec))
        return (held + shape.working_bytes()) * itemsize <= room

    return fits
