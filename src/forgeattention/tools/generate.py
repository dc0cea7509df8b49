"""`forgeattn generate`: one answer, from the packed or the exact cache, by transformers or mlx-lm."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

from .. import models
from ..util.environment import environment
from .evaluation.setup import caches, spec_from


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Stream the model's continuation of `args.prompt` to standard output and return it with its figures."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise ValueError("[generate] expected a prompt; got an empty one")
    if args.max_new_tokens < 1:
        raise ValueError(f"[generate] expected --max-new-tokens >= 1; got {args.max_new_tokens}")
    if args.prompt_cache is not None and (args.engine != "mlx" or args.cache != "packed"):
        raise ValueError("[generate] expected --prompt-cache with --engine mlx and the packed cache; got another")
    found = by_mlx(args, prompt) if args.engine == "mlx" else by_transformers(args, prompt)
    return {**found, "engine": args.engine, "cache": args.cache, "model": args.model, **environment()}


def by_transformers(args: argparse.Namespace, prompt: str) -> dict[str, Any]:
    """The answer of a transformers model."""
    import torch
    from transformers import TextStreamer

    from .evaluation import memory
    from .evaluation.streaming import attention

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
        "cache_bytes": memory.cache_bytes(cache),
    }


def by_mlx(args: argparse.Namespace, prompt: str) -> dict[str, Any]:
    """The answer of an mlx-lm model. A file of `--prompt-cache` is read if it exists, and takes the conversation so
    far, answer included."""
    if importlib.util.find_spec("mlx_lm") is None:
        raise RuntimeError("[generate] mlx-lm is not installed: pip install 'forgeattention[mlx]'")
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.models import cache as stock
    from mlx_lm.sample_utils import make_sampler

    from ..integrations.mlx import load_prompt_cache, make_prompt_cache, patched, save_prompt_cache, warm_up

    spec = spec_from(args)
    model, tokenizer = mlx_lm.load(models.folder(args.model))
    packed, file = args.cache == "packed", args.prompt_cache
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise ValueError(f"[generate] expected --prompt-cache in a folder that exists; got {file}")
    if packed and mx.default_device().type == mx.gpu:
        warm_up(model, lambda: make_prompt_cache(model, spec))
    if file is not None and Path(file).is_file():
        cache = load_prompt_cache(file, model)
    else:
        cache = make_prompt_cache(model, spec) if packed else stock.make_prompt_cache(model)
    ids = tokenizer.encode(prompt)
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    mx.random.seed(args.seed)
    text, last = "", None
    start = time.perf_counter()
    with patched():
        steps = mlx_lm.stream_generate(
            model, tokenizer, ids, max_tokens=args.max_new_tokens, prompt_cache=cache,
            sampler=make_sampler(args.temperature),
        )  # fmt: skip
        for last in steps:
            print(last.text, end="", flush=True)
            text += last.text
    print()
    assert last is not None
    seconds = time.perf_counter() - start
    if file is not None:
        save_prompt_cache(file, cache, model)
    return {
        "text": text,
        "prompt_tokens": last.prompt_tokens,
        "new_tokens": last.generation_tokens,
        "seconds": seconds,
        "cache_bytes": sum(layer.nbytes for layer in cache),
        "prompt_tps": last.prompt_tps,
        "generation_tps": last.generation_tps,
        "peak_bytes": int(last.peak_memory * 1e9),
    }
