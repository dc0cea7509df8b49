"""mlx-lm: packed prompt caches, in its own functions and server."""

from typing import Any

from .prompt import (
    PackedKVCache,
    full_attention,
    load_prompt_cache,
    make_prompt_cache,
    patched,
    report,
    save_prompt_cache,
    trim_prompt_cache,
)
from .warmup import warm_up

__all__ = [
    "PackedKVCache",
    "full_attention",
    "load_prompt_cache",
    "make_prompt_cache",
    "patched",
    "report",
    "save_prompt_cache",
    "serve",
    "trim_prompt_cache",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    if name == "serve":  # brings mlx-lm's server with it
        from .server import serve

        return serve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
