"""Packed caches for mlx-lm: see `forgeattention.integrations.mlx_lm`."""

from .integrations.mlx_lm import (
    PackedKVCache,
    load_prompt_cache,
    make_prompt_cache,
    patched,
    report,
    save_prompt_cache,
    serve,
    trim_prompt_cache,
)

__all__ = [
    "PackedKVCache",
    "load_prompt_cache",
    "make_prompt_cache",
    "patched",
    "report",
    "save_prompt_cache",
    "serve",
    "trim_prompt_cache",
]
