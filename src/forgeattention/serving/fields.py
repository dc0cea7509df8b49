"""Fields of requests that are not honoured: which values change nothing, and what is said of the others.

A field that is neither in a schema nor here is refused too, so none is ignored without a word. null is every field's
default and always passes.
"""

from __future__ import annotations

import json
from typing import Any

FREE = {
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
}
"""Names for the client's own books, which no server answers differently to."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "verbosity": (),
    "web_search_options": (),
    # vLLM, SGLang
    "add_generation_prompt": (True,),
    "add_special_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "lora_path": (),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "regex": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    # llama.cpp, Ollama
    "cache_prompt": (True,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "grammar": ("",),
    "json_schema": (),
    "keep_alive": (),
    "mirostat": (0,),
    "n_predict": (),
    "n_probs": (0,),
    "num_ctx": (),
    "options": ({},),
    "repeat_penalty": (1,),
    "think": (),
    "tfs_z": (1,),
    "typical_p": (1,),
    "xtc_probability": (0,),
}
"""Fields that would change an answer and are refused, with the values that pass since they change nothing."""


def refusal(name: str, value: Any) -> str | None:
    """Why a field that no schema has is refused; None where it passes."""
    if value is None or name in FREE:
        return None
    if name not in NEUTRAL:
        return f"{name[:100]}: this server knows no such field"
    if any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[name]):
        return None
    return f"{name}: not supported" + (f"; only {_listed(NEUTRAL[name])} passes" if NEUTRAL[name] else "")


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(json.dumps(value) for value in values)
