"""Folders of the user's that this package writes to."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's folder for converted models: $FORGEATTENTION_CACHE, or forgeattention below $XDG_CACHE_HOME."""
    if folder := os.environ.get("FORGEATTENTION_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "forgeattention"
