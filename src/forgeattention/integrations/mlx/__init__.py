"""mlx-lm: packed prompt caches, in its own functions and server."""

from .prompt import (
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
