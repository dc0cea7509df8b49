"""GGUF files opened safely: what the `gguf` package believes of a file's header is checked against its size first.

The layout is that of the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type's number; text and arrays, 8 and 9, say their own."""
STRING, ARRAY = 8, 9
DEEPEST = 8
"""Arrays of arrays nested deeper are refused."""


class _Header:
    """A file read from its start, never past its end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.left = os.fstat(file.fileno()).st_size

    def skip(self, count: int) -> None:
        self._take(count)
        self.file.seek(count, os.SEEK_CUR)

    def number(self, form: str) -> int:
        size = struct.calcsize(form)
        self._take(size)
        return struct.unpack("<" + form, self.file.read(size))[0]

    def text(self) -> None:
        self.skip(self.number("Q"))

    def value(self, kind: int, depth: int = 0) -> None:
        if kind in NUMBERS:
            self.skip(NUMBERS[kind])
        elif kind == STRING:
            self.text()
        elif kind == ARRAY and depth < DEEPEST:
            inner, count = self.number("I"), self.number("Q")
            if inner in NUMBERS:
                self.skip(count * NUMBERS[inner])
                return
            # Each element takes 8 bytes and more, so the file's end bounds the loop.
            for _ in range(count):
                self.value(inner, depth + 1)
        else:
            raise ValueError(f"a value of type {kind}")

    def _take(self, count: int) -> None:
        if count > self.left:
            raise ValueError(f"{count} bytes where {self.left} are left")
        self.left -= count


def open_gguf(path: str | os.PathLike[str]) -> Any:
    """A `gguf.GGUFReader` of a file whose header fits into it.

    Raises:
        ValueError: a file that is cut, damaged in its header, or no GGUF file. Numbers inside have no checksum.
        ImportError: gguf is missing (extra "hf").
    """
    from gguf import GGUFReader

    try:
        with Path(path).open("rb") as file:
            header = _Header(file)
            header.skip(4)
            header.number("I")
            tensors, fields = header.number("Q"), header.number("Q")
            for _ in range(fields):
                header.text()
                header.value(header.number("I"))
            for _ in range(tensors):
                header.text()
                header.skip(8 * header.number("I") + 12)
        return GGUFReader(os.fspath(path))
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, struct.error) as error:
        raise ValueError(f"[models] expected a whole GGUF file; got {path}: {error}") from None
