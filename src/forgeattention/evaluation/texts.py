"""The texts that are shipped with the package (data/README.md says what they are)."""

from __future__ import annotations

from importlib import resources

TEXTS = ("licences", "genesis")


def read(name: str) -> str:
    """The whole of a shipped text. Raises ValueError for a name not in `TEXTS`."""
    if name not in TEXTS:
        raise ValueError(f"[texts] expected a name in {TEXTS}; got {name!r}")
    return resources.files(__package__).joinpath("data", f"{name}.txt").read_text(encoding="utf-8")
