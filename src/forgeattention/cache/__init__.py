"""Caches: pages of packed tokens, exact sinks and recent tokens, saved and exported caches."""

from .append import STEP_TOKENS
from .arrays import Arrays, MLXArrays, NumpyArrays, TorchArrays, arrays_of
from .layer import LayerCache
from .pending import PendingTokens
from .pool import PagePool
from .storage import load, save, saved_extra
from .transfer import export_pages, export_row, import_pages, import_row

__all__ = [
    "STEP_TOKENS",
    "Arrays",
    "LayerCache",
    "MLXArrays",
    "NumpyArrays",
    "PagePool",
    "PendingTokens",
    "TorchArrays",
    "arrays_of",
    "export_pages",
    "export_row",
    "import_pages",
    "import_row",
    "load",
    "save",
    "saved_extra",
]
