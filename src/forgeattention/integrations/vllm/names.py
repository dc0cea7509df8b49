"""Names for `--kv-cache-dtype`, from vLLM 0.33 on: the preset goes by a name that vLLM checks, prints and compares."""

from __future__ import annotations

from typing import Any

import torch

PRESET_OF = {"forge2": "small", "forge3": "balanced", "forge4": "fidelity"}
"""Presets by their names as a KV cache dtype."""


def register_names() -> None:
    """Tells vLLM of the names, where it has a way to be told; may be called again."""
    from vllm.config import cache
    from vllm.v1.kv_cache_interface import KVQuantMode

    register = getattr(cache, "register_kv_cache_dtype", None)
    if register is None:
        return
    for each in PRESET_OF:
        if not cache.is_known_kv_cache_dtype(each):
            register(each)(_handler(each, KVQuantMode.CUSTOM))


def _handler(named: str, mode: Any) -> type:
    """The class by which vLLM asks what a KV cache dtype is."""

    class Handler:
        name = named

        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> Any:
            return mode

    return Handler
