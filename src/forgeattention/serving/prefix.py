"""Prefixes of earlier prompts, kept packed for later ones, also across restarts."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..integrations.hf.cache import ForgeCache

log = logging.getLogger("forgeattention")

SUFFIX = ".forgecache"


class PrefixCache:
    """Caches of prompt prefixes by their tokens, least recently used first.

    Prefixes end at multiples of `step` tokens, where a prompt is read in pieces of `step`: a prompt that goes on from a
    kept prefix is then read in the same pieces as a fresh one, and its answer is the same, bit for bit.

    Args:
        step: tokens per piece.
        entries: most prefixes kept in memory.
        folder: where `persist` writes and `get` looks for what is not in memory, or None.
        max_bytes: most bytes of the folder's files.
        read: reads a saved cache; raises ValueError or OSError where it cannot be used.
    """

    def __init__(
        self,
        step: int,
        entries: int,
        folder: Path | None = None,
        max_bytes: int = 0,
        read: Callable[[Path], ForgeCache] | None = None,
    ) -> None:
        self.step = step
        self.entries = entries
        self.folder = folder
        self.max_bytes = max_bytes
        self._read = read
        self._kept: OrderedDict[str, ForgeCache] = OrderedDict()
        self.hit_tokens = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"*{SUFFIX}*.part"):
                left.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._kept)

    def keys(self, tokens: Sequence[int]) -> list[str]:
        """Names of the prefixes of `step`, 2 `step`, ... tokens, each by the digest of all of its tokens."""
        digest, names = hashlib.sha256(f"{self.step}".encode()), []
        for end in range(self.step, len(tokens) + 1, self.step):
            digest.update(np.asarray(tokens[end - self.step : end], "<i8").tobytes())
            names.append(digest.hexdigest()[:40])
        return names

    def get(self, tokens: Sequence[int]) -> tuple[int, ForgeCache | None]:
        """The longest kept prefix that leaves at least one token to read: its length and a cache of its own."""
        names = self.keys(tokens[: len(tokens) - 1])
        for i in range(len(names) - 1, -1, -1):
            cache = self._kept.get(names[i]) or self._from_disk(names[i])
            if cache is not None:
                self._kept.move_to_end(names[i])
                length = (i + 1) * self.step
                self.hit_tokens += length
                return length, cache.fork()
        return 0, None

    def put(self, tokens: Sequence[int], cache: ForgeCache) -> None:
        """Keeps a cache that holds exactly these tokens, a multiple of `step`; its pages are shared."""
        name = self.keys(tokens)[-1]
        if self.entries and name not in self._kept:
            self._kept[name] = cache.fork()
        if name in self._kept:
            self._kept.move_to_end(name)
        while len(self._kept) > self.entries:
            self.drop_oldest()

    def drop_oldest(self) -> bool:
        """Gives the least recently used prefix's pages back; False where there is none."""
        if not self._kept:
            return False
        self._kept.popitem(last=False)
        return True

    def persist(self, model: Any) -> int:
        """Writes the prefixes, newest first while they fit, and removes older files. A file is replaced whole; one
        that cannot be written is left out, and the log says why.

        Returns:
            Files in the folder.
        """
        if self.folder is None:
            return 0
        kept, total = set(), 0
        for name in reversed(self._kept):
            path = self.folder / f"{name}{SUFFIX}"
            try:
                if not path.exists():
                    self._kept[name].save(path, model)
                size = path.stat().st_size
            except OSError as error:
                log.error("prefix cache: %s was not written: %s", path, error)
                break
            if total + size > self.max_bytes:
                path.unlink()
                break
            total += size
            kept.add(path.name)
        older = [p for p in self.folder.glob(f"*{SUFFIX}") if p.name not in kept]
        for path in sorted(older, key=lambda p: p.stat().st_mtime, reverse=True):
            total += path.stat().st_size
            if total > self.max_bytes:
                path.unlink()
            else:
                kept.add(path.name)
        return len(kept)

    def _from_disk(self, name: str) -> ForgeCache | None:
        if self.folder is None or self._read is None or not self.entries:
            return None
        path = self.folder / f"{name}{SUFFIX}"
        if not path.exists():
            return None
        try:
            cache = self._read(path)
        except (ValueError, OSError) as error:
            log.warning("prefix cache: %s is not used and was removed: %s", path, error)
            path.unlink(missing_ok=True)
            return None
        self._kept[name] = cache
        while len(self._kept) > self.entries:
            self.drop_oldest()
        return cache
