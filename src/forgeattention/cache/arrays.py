"""The few array operations that a cache needs of its framework."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..ops.arrays import dtype_of, is_mlx, is_torch
from ..ops.registry import native


class Arrays(Protocol):
    """Arrays of one framework on one device. Slicing, slice assignment, indexing by integer arrays and `swapaxes` are
    those of NumPy and torch, but that writing to a slice may not write to what it was taken from; data types go by
    NumPy's names, and "bfloat16"."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """An uninitialised array."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any: ...

    def concat(self, parts: list[Any], axis: int) -> Any: ...

    def copy(self, array: Any) -> Any: ...

    def take(self, array: Any, rows: NDArray[np.int64]) -> Any:
        """A copy of the given rows of the first axis."""

    def index(self, values: NDArray[np.int64]) -> Any:
        """Host integers as an array to index with."""

    def assign(self, target: Any, values: NDArray[Any], at: Any = ...) -> None:
        """Copies a host array of the same shape and dtype into `target[at]`, without waiting for the device."""

    def to_host(self, array: Any) -> NDArray[Any]:
        """A host copy (or view). bfloat16 comes as uint16 bit patterns."""

    def address(self, array: Any) -> int:
        """Address of the first element."""

    def nbytes(self, array: Any) -> int: ...

    def owns(self, array: Any) -> bool:
        """Whether an array belongs to this framework and device."""

    def finite(self, arrays: Sequence[Any]) -> Callable[[], list[bool]]:
        """Starts to look whether every element of each array is finite; what it gives waits for the answer."""

    @property
    def on_host(self) -> bool:
        """Whether reading a value costs no wait for a device."""

    @property
    def addressable(self) -> bool:
        """Whether pages are found by their address, not by their place in one array that all kernels are given."""


class NumpyArrays:
    """NumPy arrays."""

    on_host = addressable = True

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return np.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        return np.zeros(shape, dtype)

    def concat(self, parts: list[Any], axis: int) -> Any:
        return np.concatenate(parts, axis)

    def copy(self, array: Any) -> Any:
        return array.copy()

    def take(self, array: Any, rows: NDArray[np.int64]) -> Any:
        return array[rows]

    def index(self, values: NDArray[np.int64]) -> Any:
        return values

    def assign(self, target: Any, values: NDArray[Any], at: Any = ...) -> None:
        target[at] = values

    def to_host(self, array: Any) -> NDArray[Any]:
        return array

    def address(self, array: Any) -> int:
        return array.ctypes.data

    def nbytes(self, array: Any) -> int:
        return array.nbytes

    def owns(self, array: Any) -> bool:
        return isinstance(array, np.ndarray)

    def finite(self, arrays: Sequence[Any]) -> Callable[[], list[bool]]:
        return lambda: [bool(np.isfinite(x).all()) for x in arrays]


class TorchArrays:
    """Torch tensors on one device.

    Args:
        device: a torch.device or its name.
    """

    addressable = True

    def __init__(self, device: Any = "cpu") -> None:
        import torch

        self._torch = torch
        self.device = torch.device(device)
        self.on_host = self.device.type == "cpu"

    # Tensors made in inference mode could not be written to outside of it.
    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        with self._torch.inference_mode(False):
            return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device=self.device)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        with self._torch.inference_mode(False):
            return self._torch.zeros(shape, dtype=getattr(self._torch, dtype), device=self.device)

    def concat(self, parts: list[Any], axis: int) -> Any:
        return self._torch.cat(parts, axis)

    def copy(self, array: Any) -> Any:
        return array.clone()

    def take(self, array: Any, rows: NDArray[np.int64]) -> Any:
        with self._torch.inference_mode(False):
            return array.index_select(0, self._upload(rows))

    def index(self, values: NDArray[np.int64]) -> Any:
        return self._upload(values)

    def assign(self, target: Any, values: NDArray[Any], at: Any = ...) -> None:
        target = target[at]
        if target.dtype == self._torch.bfloat16:
            target = target.view(self._torch.uint16)
        target.copy_(self._upload(np.ascontiguousarray(values)))

    def _upload(self, values: NDArray[Any]) -> Any:
        host = self._torch.from_numpy(values)
        # A copy from pageable memory may wait for the stream; torch keeps the pinned block until the copy is done.
        return host if self.on_host else host.pin_memory().to(self.device, non_blocking=True)

    def to_host(self, array: Any) -> NDArray[Any]:
        array = array.detach()
        if array.dtype == self._torch.bfloat16:
            array = array.contiguous().view(self._torch.uint16)
        return array.cpu().numpy()

    def address(self, array: Any) -> int:
        return array.data_ptr()

    def nbytes(self, array: Any) -> int:
        return array.numel() * array.element_size()

    def owns(self, array: Any) -> bool:
        return isinstance(array, self._torch.Tensor) and array.device == self.device

    def finite(self, arrays: Sequence[Any]) -> Callable[[], list[bool]]:
        # A sum is one pass over few bytes of code; only one that is not finite needs the elements looked at.
        sums = self._torch.stack([x.sum(dtype=self._torch.float32) for x in arrays])
        if not self.on_host:
            sums = self._torch.empty(len(arrays), pin_memory=True).copy_(sums, non_blocking=True)
            copied = self._torch.cuda.current_stream(self.device).record_event()

        def answer() -> list[bool]:
            if not self.on_host:
                copied.synchronize()
            return [
                math.isfinite(total) or bool(self._torch.isfinite(x).all()) for total, x in zip(sums.tolist(), arrays)
            ]

        return answer


class MLXArrays:
    """MLX arrays, on the device that is MLX's default when this is made."""

    addressable = False

    def __init__(self) -> None:
        self._mx = importlib.import_module("mlx.core")
        self.on_host = native("mlx") == "cpu"

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self._mx.empty(shape, dtype=getattr(self._mx, dtype))

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self._mx.zeros(shape, dtype=getattr(self._mx, dtype))

    def concat(self, parts: list[Any], axis: int) -> Any:
        return self._mx.concatenate(parts, axis)

    def copy(self, array: Any) -> Any:
        return array

    def take(self, array: Any, rows: NDArray[np.int64]) -> Any:
        return self._mx.take(array, self.index(rows), axis=0)

    def index(self, values: NDArray[np.int64]) -> Any:
        return self._mx.array(values)

    def assign(self, target: Any, values: NDArray[Any], at: Any = ...) -> None:
        new = self._mx.array(values)
        target[at] = new.view(target.dtype) if dtype_of(target) == "bfloat16" else new

    def to_host(self, array: Any) -> NDArray[Any]:
        return np.array(array.view(self._mx.uint16) if dtype_of(array) == "bfloat16" else array, copy=False)

    def address(self, array: Any) -> int:
        raise ValueError("[cache] expected arrays with addresses; got MLX's, which move")

    def nbytes(self, array: Any) -> int:
        return array.nbytes

    def owns(self, array: Any) -> bool:
        return is_mlx(array)

    def finite(self, arrays: Sequence[Any]) -> Callable[[], list[bool]]:
        return lambda: [bool(self._mx.isfinite(x).all()) for x in arrays]


def arrays_of(array: Any) -> Arrays:
    """The framework and device of an array. Raises ValueError for an unknown one."""
    if isinstance(array, np.ndarray):
        return NumpyArrays()
    if is_torch(array):
        return TorchArrays(array.device)
    if is_mlx(array):
        return MLXArrays()
    raise ValueError(f"[cache] expected NumPy arrays, torch tensors or MLX arrays; got {type(array).__name__}")
