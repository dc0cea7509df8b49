"""Bytes that are really held: by a cache, and by the process at its peak."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def cache_bytes(cache: Any) -> int:
    """Bytes allocated by a cache.

    An object that knows its own `nbytes` is asked. For a stock transformers cache every tensor of every layer is
    counted by the storage behind it, once: a view costs what it keeps alive.

    Raises:
        ValueError: the object is neither.
    """
    nbytes = getattr(cache, "nbytes", None)
    if nbytes is not None:
        return int(nbytes)
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ValueError(f"[cache_bytes] expected a cache with nbytes or layers; got {type(cache).__name__}")
    storages = {}
    for layer in layers:
        for tensor in _tensors(vars(layer)):
            storage = tensor.untyped_storage()
            storages[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_rss() -> int:
    """The most bytes of main memory that this process has held, since its start or the last `reset_peak_rss`."""
    if sys.platform == "linux":
        return _status("VmHWM")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Start `peak_rss` afresh from what is held now; what the allocator keeps of freed memory is given back first.

    Raises:
        OSError: not Linux, which alone can do this, or a kernel that takes the request and ignores it, as sandboxes'
            kernels do; measure in a new process there.
    """
    if sys.platform != "linux":
        raise OSError(f"[reset_peak_rss] expected Linux; got {sys.platform}: measure in a new process instead")
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    # proc(5), /proc/pid/clear_refs: 5 resets the peak resident set size to the current one.
    Path("/proc/self/clear_refs").write_text("5")
    peak, now = _status("VmHWM"), _status("VmRSS")
    if peak - now > 16 << 20:
        raise OSError(f"[reset_peak_rss] expected a peak near {now} bytes; got {peak}: measure in a new process")


def _status(field: str) -> int:
    """A memory field of /proc/self/status, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"[peak_rss] expected {field} in /proc/self/status; got none")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def available(device: Any) -> int:
    """Bytes that `device` has free now: of the GPU, or of main memory (Linux; all of it elsewhere)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "linux":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
