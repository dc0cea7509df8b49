"""Files that are replaced whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replaced(path: str | os.PathLike[str], *, suffix: str = ".part", mode: int = 0o644) -> Iterator[str]:
    """The name of an empty file beside `path`, which takes its place when the block ends.

    After an error in the block `path` is as it was, and nothing is left beside it.

    Args:
        path: the file that is to be replaced or made.
        suffix: how the other's name ends, for writers that look at it.
        mode: permissions of the new file.
    """
    target = Path(path).absolute()
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-", suffix=suffix)
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as JSON, whole or not at all. NaN and inf, which JSON has not, raise ValueError."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with replaced(path) as temporary:
        Path(temporary).write_text(text)


def read_json(path: str | os.PathLike[str], op: str, what: str) -> Any:
    """The contents of a JSON file.

    Args:
        path: the file.
        op: who asks, for messages.
        what: what the file should be, for messages.

    Raises:
        ValueError: no JSON, or nested deeper than Python reads.
        OSError: the file cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # both kinds of wrong text are ValueErrors
        raise ValueError(f"[{op}] expected {what}; got {path}: {type(error).__name__}, {error}") from None
