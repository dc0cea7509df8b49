"""A KV cache in about 3 bits per element that attention reads in its packed form.

    from forgeattention import ForgeCache

The names below are imported when they are first used, so that `import forgeattention` alone loads neither NumPy nor
PyTorch. Using ForgeCache, DecodeGraph or register makes attn_implementation="forge" known to transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .codec import CodecSpec
    from .codec.presets import PRESETS
    from .eviction import Eviction
    from .integrations.hf import DecodeGraph, ForgeCache, register
    from .sparse import SparseSpec

__version__ = "0.1.0"
__all__ = ["PRESETS", "CodecSpec", "DecodeGraph", "Eviction", "ForgeCache", "SparseSpec", "__version__", "register"]

_HOMES = {
    "CodecSpec": "codec",
    "DecodeGraph": "integrations.hf",
    "Eviction": "eviction",
    "ForgeCache": "integrations.hf",
    "PRESETS": "codec.presets",
    "SparseSpec": "sparse",
    "register": "integrations.hf",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
