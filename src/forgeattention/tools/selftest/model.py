"""Steps with a whole model in mlx-lm: needles, and speed and memory beside mlx-lm's own caches."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

from ...codec.presets import PRESETS
from ..evaluation import texts
from .arrays import Device, Skipped, device

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What "smollm2" means without torch, which would convert the installed file."""
NEEDLES = (("SILVER COMPASS", "3159"), ("AMBER LANTERN", "7204"))
TOKENS = {True: 1500, False: 320}
"""Tokens of a haystack, on a GPU and on a CPU."""
PROMPTS = {True: 4096, False: 256}
NEW = 32


def load(asked: dict[str, Any]) -> tuple[Any, Any, Device]:
    """mlx-lm's model and tokenizer, and where they run.

    Raises:
        Skipped: another framework is tested, or mlx-lm or SmolLM2, which nobody asked for by name, is missing.
    """
    where = device(asked["device"])
    if where.framework != "mlx":
        raise Skipped(f"{where.name}: `forgeattn eval niah` asks a model of transformers")
    if importlib.util.find_spec("mlx_lm") is None:
        raise Skipped("mlx-lm is not installed")
    from ... import models

    name, dtype = asked["model"], "float16" if where.gpu else "float32"
    if name != "smollm2":
        return *models.load_mlx(name, dtype=dtype), where
    converts = all(importlib.util.find_spec(package) for package in ("torch", "transformers", "gguf"))
    try:
        return *models.load_mlx(name if converts else HUB, dtype=dtype), where
    except Exception as error:  # offline the hub's client raises several kinds
        how = "forgeattn models fetch smollm2" if converts else f"hf download {HUB}"
        raise Skipped(f"SmolLM2 is not on this machine: run `{how}`, or name a model by --model") from error


def caches(model: Any) -> dict[str, Callable[[], list[Any]]]:
    """Makers of mlx-lm's cache and of the packed ones, by name."""
    from mlx_lm.models import cache as stock

    from ...integrations.mlx import make_prompt_cache

    made: dict[str, Callable[[], list[Any]]] = {"exact": lambda: stock.make_prompt_cache(model)}
    for name in ("balanced", "small"):
        made[name] = partial(make_prompt_cache, model, PRESETS[name])
    return made


def needles(asked: dict[str, Any]) -> dict[str, Any]:
    """The step: a row a cache and needle; it fails where the exact cache finds a needle and `balanced` does not."""
    from ...integrations.mlx import patched

    model, tokenizer, where = load(asked)
    hay = tokenizer.encode(texts.read("licences"), add_special_tokens=False)
    tokens = 200 if asked["quick"] else TOKENS[where.gpu]
    rows: list[dict[str, Any]] = []
    with patched():
        for (name, number), depth in zip(NEEDLES, (0.3, 0.7)):
            before = tokenizer.decode(hay[: int(tokens * depth)])
            after = tokenizer.decode(hay[int(tokens * depth) : tokens])
            text = f"{before}\nThe secret number of {name} is {number}.\n{after}"
            prompt = f"{text}\n\nWhat is the secret number of {name}? Answer with the number alone."
            ids = _chat(tokenizer, prompt)
            for cache, make in caches(model).items():
                said = _answer(model, tokenizer, ids, make())
                rows.append({"cache": cache, "depth": depth, "found": number in said, "answer": said[:80]})
    found = {cache: sum(bool(row["found"]) for row in rows if row["cache"] == cache) for cache in caches(model)}
    said = ", ".join(f"{cache} {count} of {len(NEEDLES)}" for cache, count in found.items())
    lost = [row for row, other in zip(rows[::3], rows[1::3]) if row["found"] and not other["found"]]
    return {"status": "failed" if lost else "passed", "reason": said, "model": asked["model"], "rows": rows}


def generation(asked: dict[str, Any]) -> dict[str, Any]:
    """The step: a row a cache, all by mlx-lm's own `stream_generate`."""
    import mlx.core as mx
    import mlx_lm

    from ...integrations.mlx import patched, warm_up

    model, tokenizer, where = load(asked)
    ids = tokenizer.encode(texts.read("genesis"), add_special_tokens=False)
    ids = ids[: 200 if asked["quick"] else PROMPTS[where.gpu]]
    made = caches(model)
    kinds: dict[str, tuple[Callable[[], list[Any]], dict[str, Any]]] = {name: (make, {}) for name, make in made.items()}
    for bits in (8, 4):
        kinds[f"mlx-lm {bits} bit"] = made["exact"], {"kv_bits": bits, "quantized_kv_start": 0}
    compiling = warm_up(model, made["balanced"])
    rows = []
    with patched():
        for name, (make, options) in kinds.items():
            mx.clear_cache()
            mx.reset_peak_memory()
            cache = make()
            steps = mlx_lm.stream_generate(model, tokenizer, ids, max_tokens=NEW, prompt_cache=cache, **options)
            last = list(steps)[-1]
            rows.append(
                {
                    "cache": name,
                    "prompt_tokens": last.prompt_tokens,
                    "prompt_tps": last.prompt_tps,
                    "generation_tps": last.generation_tps,
                    "peak_gb": last.peak_memory,
                    "cache_mb": sum(layer.nbytes for layer in cache) / 1e6,
                }
            )
    said = f"compiling what a packed cache needs took {compiling:.1f} s"
    return {"status": "passed", "reason": said, "model": asked["model"], "compile_s": compiling, "rows": rows}


def _chat(tokenizer: Any, text: str) -> list[int]:
    if not tokenizer.chat_template:
        return tokenizer.encode(text)
    return list(tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True))


def _answer(model: Any, tokenizer: Any, ids: list[int], cache: list[Any]) -> str:
    import mlx_lm

    return mlx_lm.generate(model, tokenizer, ids, max_tokens=16, prompt_cache=cache, prefill_step_size=256)
