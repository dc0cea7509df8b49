"""Where demoted pages are kept: host memory or a file, bounded, shared by forks through reference counts."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]


@dataclass
class _Entry:
    data: Any
    refs: int


class HostStore:
    """Pages in host memory.

    Args:
        page_bytes: bytes of a page.
        max_bytes: most bytes held, or None.
    """

    def __init__(self, page_bytes: int, max_bytes: int | None = None) -> None:
        self.page_bytes = page_bytes
        self.max_bytes = max_bytes
        self._entries: dict[int, _Entry] = {}
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the pages held."""
        return len(self._entries) * self.page_bytes

    @property
    def room(self) -> int | None:
        """Pages that may still be put, or None without a bound."""
        return None if self.max_bytes is None else max(0, self.max_bytes // self.page_bytes - len(self._entries))

    def put(self, page: U8) -> int:
        """Keeps a copy of a page and gives its number, with one reference.

        Raises:
            ValueError: the store is full; nothing has changed.
            OSError: the page cannot be written; nothing has changed.
        """
        if self.room == 0:
            raise ValueError(f"[store] expected at most {self.max_bytes} bytes; got one page more")
        number = self._next
        self._entries[number] = _Entry(self._write(page), 1)
        self._next += 1
        return number

    def get(self, number: int) -> U8:
        """A page. Raises ValueError where it is no longer what was put."""
        return self._read(self._entries[number].data)

    def share(self, number: int) -> None:
        """Adds a reference."""
        self._entries[number].refs += 1

    def free(self, number: int) -> None:
        """Drops a reference; a page without one is forgotten."""
        entry = self._entries[number]
        entry.refs -= 1
        if not entry.refs:
            del self._entries[number]
            self._forget(entry.data)

    def _write(self, page: U8) -> Any:
        return page.copy()

    def _read(self, data: Any) -> U8:
        return data

    def _forget(self, data: Any) -> None:
        pass


class DiskStore(HostStore):
    """Pages in one nameless temporary file, which the system removes with the process, however that ends.

    Each page's SHA-256 stays in memory and is looked at when the page comes back.

    Args:
        page_bytes, max_bytes: as for `HostStore`.
        folder: where the file is made; the system's folder for temporary files if None.
    """

    def __init__(self, page_bytes: int, max_bytes: int | None = None, folder: str | os.PathLike[str] | None = None):
        super().__init__(page_bytes, max_bytes)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._slots = 0
        self._free: list[int] = []

    def _write(self, page: U8) -> tuple[int, bytes]:
        slot = self._free[-1] if self._free else self._slots
        done, data = 0, memoryview(page.tobytes())
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done:], slot * self.page_bytes + done)
        if self._free:
            self._free.pop()
        else:
            self._slots += 1
        return slot, hashlib.sha256(data).digest()

    def _read(self, data: tuple[int, bytes]) -> U8:
        slot, digest = data
        page = os.pread(self._file.fileno(), self.page_bytes, slot * self.page_bytes)
        if hashlib.sha256(page).digest() != digest:
            raise ValueError(f"[store] expected page {slot} as it was written; got other bytes: the file was changed")
        return np.frombuffer(bytearray(page), np.uint8)

    def _forget(self, data: tuple[int, bytes]) -> None:
        self._free.append(data[0])
