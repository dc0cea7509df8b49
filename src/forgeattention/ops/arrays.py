"""What the ops ask of an array, whichever framework it belongs to."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import numpy as np

Array = Annotated[Any, "array"]
"""A NumPy array, a torch tensor or an MLX array."""
DType = Annotated[Any, "dtype"]
"""A dtype's name, a NumPy type or another framework's dtype."""
FLOATS = ("float32", "float16", "bfloat16")
_torch_names: dict[Any, str] = {}


def is_torch(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def traced() -> bool:
    """Whether torch.compile or torch.export is reading this call, so that it must become one of `ops.operators`."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def is_mlx(x: Any) -> bool:
    mx = sys.modules.get("mlx.core")
    return mx is not None and isinstance(x, mx.array)


def device_of(x: Any) -> str:
    """ "cpu", "cuda" or "mlx"; "" for what is not an array of a known framework."""
    if is_torch(x):
        return x.device.type
    if isinstance(x, np.ndarray):
        return "cpu"
    return "mlx" if is_mlx(x) else ""


def dtype_of(x: Any) -> str:
    """NumPy's name of the element type, and "bfloat16"."""
    if isinstance(x, np.ndarray):
        return x.dtype.name
    dtype = x.dtype
    name = _torch_names.get(dtype)
    if name is None:
        name = _torch_names[dtype] = str(dtype).rpartition(".")[2]
    return name


def dtype_name(dtype: Any) -> str:
    """The name of a dtype given as a string, a NumPy type or another framework's dtype."""
    text = dtype if isinstance(dtype, str) else str(dtype)
    name = text.rpartition(".")[2].rstrip("'>")
    return name if name == "bfloat16" else np.dtype(name).name


def empty_like(x: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """An uninitialised array of x's framework and device. A NumPy one cannot be bfloat16."""
    if is_torch(x):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=x.device)
    return np.empty(shape, dtype)


def is_contiguous(x: Any) -> bool:
    """Whether an array lies in memory in the order of its indices."""
    return x.is_contiguous() if is_torch(x) else not isinstance(x, np.ndarray) or x.flags.c_contiguous


def to_numpy(x: Any) -> Any:
    """A NumPy array of the same values; bfloat16 becomes float32. For the reference backend and tests."""
    if isinstance(x, np.ndarray):
        return x
    if is_torch(x):
        x = x.detach().cpu()
        return (x.float() if dtype_of(x) == "bfloat16" else x).numpy()
    return np.asarray(x.astype(sys.modules["mlx.core"].float32) if dtype_of(x) == "bfloat16" else x)


def from_numpy(array: Any, like: Any, dtype: str) -> Any:
    """A NumPy array as one of `like`'s framework and device, in `dtype`."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.from_numpy(np.ascontiguousarray(array)).to(like.device, getattr(torch, dtype))
    if isinstance(like, np.ndarray):
        return np.ascontiguousarray(array, dtype)
    mx = sys.modules["mlx.core"]
    return mx.array(np.ascontiguousarray(array)).astype(mx.bool_ if dtype == "bool" else getattr(mx, dtype))
