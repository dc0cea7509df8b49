"""`forgeattn generate`: one answer, from the packed or the exact cache."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from .. import models
from ..util.environment import environment
from .evaluation import memory
from .evaluation.setup import caches, spec_from
from .evaluation.streaming import attention


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Stream the model's continuation of `args.prompt` to standard output and return it with its figures."""
    from transformers import TextStreamer

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise ValueError("[generate] expected a prompt; got an empty one")
    if args.max_new_tokens < 1:
        raise ValueError(f"[generate] expected --max-new-tokens >= 1; got {args.max_new_tokens}")
    model, tokenizer = models.load(args.model)
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    make_exact, make_packed = caches(model, spec_from(args))
    packed = args.cache == "packed"
    cache = make_packed() if packed else make_exact()
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    with attention(model, "forge" if packed else None):
        out = model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=args.max_new_tokens,
            do_sample=args.temperature > 0,
            temperature=args.temperature or None,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    seconds = time.perf_counter() - start
    new = out[0, inputs["input_ids"].shape[1] :]
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": int(inputs["input_ids"].shape[1]),
        "new_tokens": len(new),
        "seconds": seconds,
        "cache": args.cache,
        "cache_bytes": memory.cache_bytes(cache),
        "model": args.model,
        **environment(),
    }
