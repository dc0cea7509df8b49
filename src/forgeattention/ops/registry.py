"""What an op is: a checked function, the launchers that backends have for it, and an operator for torch's tracers.

An op's function checks its arguments and ends in `launch(name, array, backend)(...)`, which finds the launcher in the
tables of `forgeattention.backends`. `ops.decorator` registers it, `ops.operators` makes the operators.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypedDict

from .arrays import device_of, is_torch

BACKENDS = ("cpu", "cuda", "metal", "reference")
# Devices whose memory a backend can read. MLX's lies where processor and GPU both reach it.
READS = {"cpu": ("cpu", "mlx"), "cuda": ("cuda", "mlx"), "metal": ("mlx",), "reference": ("cpu", "cuda", "mlx")}


@dataclass(frozen=True)
class Op:
    """An op as its decorator registered it.

    Attributes:
        function: what was decorated.
        fake: gives arrays of the results' shapes and dtypes, from the same arguments without `backend`.
        mutates: names of the parameters that the op writes.
    """

    function: Callable[..., Any]
    fake: Callable[..., Any]
    mutates: tuple[str, ...]


OPS: dict[str, Op] = {}


class BackendStatus(TypedDict):
    """One line of `report`."""

    backend: str
    available: bool
    reason: str
    lacks: list[str]


def _package(backend: str) -> Any:
    return importlib.import_module(f"forgeattention.backends.{backend}")


def status(backend: str, mlx: bool = False) -> tuple[bool, str]:
    """Whether a backend can run here, and why, in words; on MLX arrays if `mlx`."""
    package = _package(backend)
    return package.available_to_mlx() if mlx else package.available()


def table(backend: str, mlx: bool = False) -> dict[str, str]:
    """The ops that a backend has, each with the module that launches it; on MLX arrays if `mlx`."""
    package = _package(backend)
    return package.MLX_OPS if mlx else package.OPS


@cache
def find(name: str, backend: str, mlx: bool) -> tuple[Callable[..., Any] | None, str]:
    """The function that launches an op; (None, why not) where there is none."""
    module = table(backend, mlx).get(name)
    if module is None:
        return None, f"backend {backend!r} has no {name}" + (" for MLX arrays" if mlx else "")
    available, reason = status(backend, mlx)
    if not available:
        return None, reason
    return getattr(importlib.import_module(f"forgeattention.backends.{module}"), name), reason


def paged_steps(backend: str) -> Any:
    """What launches the steps of a paged engine, which owns the memory (integrations/vllm): a module of the backend.

    These are no ops: a step reads block tables on the device and is captured in a CUDA graph, so its launchers get
    memory that was allocated and checked when the engine bound it. Which they are says the module's `__all__`.

    Args:
        backend: one of `BACKENDS`.

    Raises:
        ValueError: the backend has none.
    """
    module = getattr(_package(backend), "PAGED_STEPS", None)
    if module is None:
        raise ValueError(f"[paged_steps] expected a backend that launches a paged engine's steps; got {backend!r}")
    return importlib.import_module(f"forgeattention.backends.{module}")


def native(device: str) -> str:
    """The backend that "auto" means for arrays of a device; "" for none. MLX arrays have no device of their own: the
    default device counts, as it does for MLX's own operations."""
    if device != "mlx":
        return device if device in ("cpu", "cuda") else ""
    mx = sys.modules["mlx.core"]
    if mx.default_device().type == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def launch(name: str, array: Any, backend: str = "auto") -> Callable[..., Any]:
    """The function that launches an op.

    Args:
        name: the op's name.
        array: the op's main argument; its framework and device decide.
        backend: "auto" or one of `BACKENDS`.

    Raises:
        ValueError: an unknown backend, one that cannot run here, lacks the op or cannot read the array.
    """
    kind: Any = type(array)
    if is_torch(array):
        return of_torch(name, kind, array.device.type, backend)
    return _launcher(name, kind, device_of(array), backend)


@cache
def of_torch(name: str, kind: type, device: str, backend: str) -> Callable[..., Any]:
    """As `launch`, for torch tensors of a class on a device: nothing else decides, so it is found once."""
    return _launcher(name, kind, device, backend)


def _launcher(name: str, kind: type, device: str, backend: str) -> Callable[..., Any]:
    chosen = backend
    if backend == "auto":
        chosen = native(device)
        if not chosen:
            raise ValueError(f"[{name}] expected an array of NumPy, torch or MLX; got {_describe(kind, device)}")
    elif backend not in BACKENDS:
        raise ValueError(f"[{name}] expected backend 'auto' or one of {BACKENDS}; got {backend!r}")
    elif device not in READS[backend]:
        raise ValueError(f"[{name}] expected arrays that backend {backend!r} reads; got {_describe(kind, device)}")
    function, reason = find(name, chosen, device == "mlx")
    if function is None:
        raise ValueError(f"[{name}] expected backend {chosen!r} to be available; got: {reason}")
    return function


def _describe(kind: type, device: str) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" + (f" on {device}" if device else "")


def report() -> list[BackendStatus]:
    """Every backend: whether it can run here and why, and the ops that it lacks; on MLX arrays as lines of their own
    where MLX is installed."""
    rows = [("cpu", False), ("cuda", False), ("metal", True), ("reference", False)]
    if importlib.util.find_spec("mlx") is not None:
        rows += [("cpu", True), ("cuda", True)]
    out: list[BackendStatus] = []
    for backend, mlx in rows:
        available, reason = status(backend, mlx)
        shown = f"{backend}, MLX" if mlx and backend != "metal" else backend
        lacks = sorted(set(OPS) - set(table(backend, mlx)))
        out.append({"backend": shown, "available": available, "reason": reason, "lacks": lacks})
    return out
