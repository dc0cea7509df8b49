"""Where demoted pages are kept: host memory or a file, bounded, shared by forks through reference counts."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

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

    Each page's SHA-256 stays in memory and is looked at when the page comes back. After a fork both processes read the
    pages that were there, and neither writes over them: the child puts new pages into a file of its own, and the
    parent into new places.

    Args:
        page_bytes, max_bytes: as for `HostStore`.
        folder: where the file is made; the system's folder for temporary files if None.
    """

    def __init__(self, page_bytes: int, max_bytes: int | None = None, folder: str | os.PathLike[str] | None = None):
        super().__init__(page_bytes, max_bytes)
        self._folder = folder
        self._open()
        _of_this_process.add(self)

    def _open(self) -> None:
        self._file: Any = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
        self._slots = self._shared = 0
        self._free: list[int] = []

    def keep_shared(self) -> None:
        """In a process that was forked: leaves the places of all pages so far to both."""
        self._free, self._shared = [], self._slots

    def part(self) -> None:
        """In the child: new pages go to a file of its own, made when the first one comes."""
        self._free, self._slots, self._shared = [], 0, 0
        self._file = None

    def _write(self, page: U8) -> tuple[Any, int, bytes]:
        if self._file is None:
            self._open()
        slot = self._free[-1] if self._free else self._slots
        done, data = 0, memoryview(page.tobytes())
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done:], slot * self.page_bytes + done)
        if self._free:
            self._free.pop()
        else:
            self._slots += 1
        return self._file, slot, hashlib.sha256(data).digest()

    def _read(self, data: tuple[Any, int, bytes]) -> U8:
        file, slot, digest = data
        page = os.pread(file.fileno(), self.page_bytes, slot * self.page_bytes)
        if hashlib.sha256(page).digest() != digest:
            raise ValueError(f"[store] expected page {slot} as it was written; got other bytes: the file was changed")
        return np.frombuffer(bytearray(page), np.uint8)

    def _forget(self, data: tuple[Any, int, bytes]) -> None:
        file, slot, _ = data
        if file is self._file and slot >= self._shared:
            self._free.append(slot)


_of_this_process: WeakSet[DiskStore] = WeakSet()


def _forked(act: Callable[[DiskStore], None]) -> Callable[[], None]:
    def every() -> None:
        for store in list(_of_this_process):
            act(store)

    return every


os.register_at_fork(after_in_parent=_forked(DiskStore.keep_shared), after_in_child=_forked(DiskStore.part))
