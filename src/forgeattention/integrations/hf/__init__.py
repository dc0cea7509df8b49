"""Hugging Face transformers: `ForgeCache` and the attention implementation "forge", which importing this registers."""

from .cache import ForgeCache, register
from .graph import DecodeGraph

__all__ = ["DecodeGraph", "ForgeCache", "register"]
