"""Which backend an op runs on."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypedDict

from .arrays import device_of

BACKENDS = ("cpu", "cuda", "metal", "reference")
# Devices whose memory a backend can read. MLX's lies where processor and GPU both reach it.
READS = {"cpu": ("cpu", "mlx"), "cuda": ("cuda", "mlx"), "metal": ("mlx",), "reference": ("cpu", "cuda", "mlx")}


class BackendStatus(TypedDict):
    """One line of `report`."""

    backend: str
    available: bool
    reason: str


def status(backend: str, mlx: bool = False) -> tuple[bool, str]:
    """Whether a backend can run here, and why, in words; on MLX arrays if `mlx`."""
    package = importlib.import_module(f"forgeattention.backends.{backend}")
    return package.available_to_mlx() if mlx else package.available()


def table(backend: str, mlx: bool = False) -> dict[str, str]:
    """The ops that a backend has, each with the module that launches it; on MLX arrays if `mlx`."""
    package = importlib.import_module(f"forgeattention.backends.{backend}")
    return package.MLX_OPS if mlx else package.OPS


@cache
def find(op: str, backend: str, mlx: bool) -> tuple[Callable[..., Any] | None, str]:
    """The function that launches an op; (None, why not) where there is none."""
    module = table(backend, mlx).get(op)
    if module is None:
        return None, f"backend {backend!r} has no {op}" + (" on MLX arrays" if mlx else "")
    available, reason = status(backend, mlx)
    if not available:
        return None, reason
    return getattr(importlib.import_module(f"forgeattention.backends.{backend}.{module}"), op), reason


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
    """Every backend, whether it can run here, and why; on MLX arrays too where that is another question."""
    out: list[BackendStatus] = []
    for name in BACKENDS:
        mlx = name == "metal"
        available, reason = status(name, mlx)
        out.append({"backend": name, "available": available, "reason": reason})
    if importlib.util.find_spec("mlx") is not None:
        for name in ("cpu", "cuda"):
            available, reason = status(name, True)
            out.append({"backend": f"{name}, MLX", "available": available, "reason": reason})
    return out


def select(op: str, array: Any, backend: str = "auto") -> Callable[..., Any]:
    """The function that runs `op`.

    Args:
        op: the op's name.
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
    launch, reason = find(op, name, device == "mlx")
    if launch is None:
        raise ValueError(f"[{op}] expected backend {name!r} to be available; got: {reason}")
    return launch


def _describe(array: Any, device: str) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}" + (f" on {device}" if device else "")
