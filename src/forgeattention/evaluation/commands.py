"""The subcommands `forgeattn eval kl` and `forgeattn eval niah`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .. import models
from ..codec.spec import CodecSpec
from . import kl, niah, report, texts


def spec_from(args: argparse.Namespace) -> CodecSpec:
    """The codec that the command line asks for."""
    return CodecSpec(k_bits=args.k_bits, v_bits=args.v_bits)


def caches(model: Any, spec: CodecSpec) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Makers of an exact and of a packed cache for `model`."""
    from transformers import DynamicCache

    from ..integrations.hf import ForgeCache

    return lambda: DynamicCache(config=model.config), lambda: ForgeCache(model.config, spec)


def run_kl(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return KL, same-top-token share and perplexity of the packed cache, over the shipped texts."""
    spec = spec_from(args)
    model, tokenizer = models.load(args.model)
    ids = tokenizer(texts.read(args.text), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    pieces = kl.windows(ids, args.length, args.windows)
    _, make_packed = caches(model, spec)
    with report.progress("Reading with both caches", args.windows) as advance:
        result = kl.compare(model, pieces, make_packed, block=args.block, implementation="forge", on_window=advance)
    bits = spec.page_format(head_dim(model)).effective_bits
    print(
        f"{args.text}, {result.positions} positions, {bits:.3f} bits per element: KL {result.kl:.4f} nats, same top "
        f"token {result.same_top:.1%}, perplexity {result.perplexity:.3f} (exact {result.exact_perplexity:.3f})"
    )
    return {
        "kl": result.kl,
        "same_top": result.same_top,
        "effective_bits": bits,
        "positions": result.positions,
        "perplexity": result.perplexity,
        "exact_perplexity": result.exact_perplexity,
        "text": args.text,
        "block": args.block,
        "model": args.model,
        "spec": spec.to_json(),
        "env": report.environment(),
    }


def run_niah(args: argparse.Namespace) -> dict[str, Any]:
    """Ask the strict needle question of the exact and of the packed cache; print and return every outcome."""
    spec = spec_from(args)
    model, tokenizer = models.load(args.model)
    make_exact, make_packed = caches(model, spec)
    setting: dict[str, Any] = {"lengths": args.lengths, "depths": args.depths, "block": args.block}
    count = len(args.lengths) * len(args.depths)
    with report.progress("Asking for the needle", 2 * count) as advance:
        exact = niah.run(model, tokenizer, make_exact, on_cell=lambda _: advance(), **setting)
        packed = niah.run(model, tokenizer, make_packed, implementation="forge", on_cell=lambda _: advance(), **setting)
    cells = [
        {
            "length": one.length,
            "depth": one.depth,
            "needle": one.needle.sentence,
            "exact": one.outcome.value,
            "packed": other.outcome.value,
            "exact_text": one.reply.text,
            "packed_text": other.reply.text,
        }
        for one, other in zip(exact, packed, strict=True)
    ]
    for cell in cells:
        print(f"{cell['length']:>7} tokens, depth {cell['depth']:.2f}: exact {cell['exact']}, packed {cell['packed']}")
    exact_pass = sum(cell.outcome is niah.Outcome.PASS for cell in exact)
    packed_pass = sum(cell.outcome is niah.Outcome.PASS for cell in packed)
    bits = spec.page_format(head_dim(model)).effective_bits
    print(f"exact {exact_pass}/{count}, packed {packed_pass}/{count} at {bits:.3f} bits per element")
    return {
        "cells": cells,
        "exact_pass": exact_pass,
        "packed_pass": packed_pass,
        "of": count,
        "kept": 1.0,
        "effective_bits": bits,
        "model": args.model,
        "spec": spec.to_json(),
        "env": report.environment(),
    }


def head_dim(model: Any) -> int:
    """Channels of one attention head of `model`."""
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
