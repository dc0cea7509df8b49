"""Hugging Face transformers: `ForgeCache` and the attention implementation "forge", which importing this registers."""

from .attention import register
from .cache import ForgeCache
from .graph import DecodeGraph

__all__ = ["DecodeGraph", "ForgeCache", "register"]
