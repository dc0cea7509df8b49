"""The user's folders that this package writes to."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Where files of one kind are kept that can be made again: "models" (converted), "cuda" (compiled
    kernels), "metal" (measured plans).

    A folder of $FORGEATTENTION_CACHE if that is set, else of forgeattention under $XDG_CACHE_HOME or ~/.cache. The
    folder need not exist yet.
    """
    if folder := os.environ.get("FORGEATTENTION_CACHE"):
        return Path(folder) / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "forgeattention" / kind
