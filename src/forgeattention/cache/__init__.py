"""Caches: pages of packed tokens, exact sinks and recent tokens, saved caches."""

from .arrays import Arrays, MLXArrays, NumpyArrays, TorchArrays, arrays_of
from .pages import PagePool
from .sequence import LayerCache
from .storage import load, save

__all__ = ["Arrays", "LayerCache", "MLXArrays", "NumpyArrays", "PagePool", "TorchArrays", "arrays_of", "load", "save"]
