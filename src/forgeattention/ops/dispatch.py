"""Which backend an op runs on."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from functools import lru_cache
from types import ModuleType
from typing import Any, TypedDict

from .arrays import device_of

log = logging.getLogger("forgeattention")

BACKENDS = ("cpu", "cuda", "metal", "reference")
# Devices whose memory a backend can read. MLX's lies where processor and GPU both reach it.
READS = {"cpu": ("cpu", "mlx"), "cuda": ("cuda", "mlx"), "metal": ("mlx",), "reference": ("cpu", "cuda", "mlx")}
# Modules that launch a backend's kernels on MLX arrays, where they are not the backend's own.
FOR_MLX = {"cpu": "mlx_cpu", "cuda": "mlx_cuda"}


class BackendStatus(TypedDict):
    """One line of `report`."""

    backend: str
    available: bool
    reason: str


@lru_cache
def load(backend: str) -> tuple[ModuleType | None, str]:
    """The backend's module and a reason in words: (None, why not) where it cannot run here."""
    try:
        module = importlib.import_module(f"forgeattention.backends.{backend}")
    except ImportError as error:
        return None, str(error)
    available, reason = module.available()
    return (module if available else None), reason


def native(device: str) -> str:
    """The backend that "auto" means for arrays of a device; "" for none. MLX arrays have no device of their own: the
    default device counts, as it does for MLX's own operations."""
    if device != "mlx":
        return device if device in ("cpu", "cuda") else ""
    mx = sys.modules["mlx.core"]
    if mx.default_device().type == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def report() -> list[BackendStatus]:
    """Every backend, whether it can run here, and why; on MLX arrays too where their launcher is another."""
    out: list[BackendStatus] = []
    for name in BACKENDS:
        module, reason = load(name)
        out.append({"backend": name, "available": module is not None, "reason": reason})
    if importlib.util.find_spec("mlx") is not None:
        for name, other in FOR_MLX.items():
            module, reason = load(other)
            out.append({"backend": f"{name}, MLX", "available": module is not None, "reason": reason})
    return out


def select(op: str, array: Any, backend: str = "auto") -> tuple[ModuleType, str]:
    """The module that runs `op`, and why it was chosen.

    Args:
        op: the op's name; the module has a function of that name.
        array: the op's main argument; its framework and device decide.
        backend: "auto" or one of `BACKENDS`.

    Raises:
        ValueError: an unknown backend, one that cannot run here, lacks the op or cannot read the array.
    """
    device = device_of(array)
    name = backend
    if backend == "auto":
        name = native(device)
        if not name:
            raise ValueError(f"[{op}] expected an array of NumPy, torch or MLX; got {_describe(array, device)}")
    elif backend not in BACKENDS:
        raise ValueError(f"[{op}] expected backend 'auto' or one of {BACKENDS}; got {backend!r}")
    elif device not in READS[backend]:
        raise ValueError(f"[{op}] expected arrays that backend {backend!r} reads; got {_describe(array, device)}")
    module, reason = load(FOR_MLX.get(name, name) if device == "mlx" else name)
    if module is not None and not hasattr(module, op):
        module, reason = None, f"backend {name!r} has no {op}"
    if module is not None:
        return module, f"backend {name!r} named" if backend != "auto" else f"{device} arrays"
    raise ValueError(f"[{op}] expected backend {name!r} to be available; got: {reason}")


def _describe(array: Any, device: str) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}" + (f" on {device}" if device else "")
