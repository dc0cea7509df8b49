"""Arrays of the framework and device that are tested."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Skipped(Exception):
    """A step that cannot be done here; says why."""


@dataclass(frozen=True)
class Device:
    """Where ops run.

    Attributes:
        framework: "mlx", "torch" or "numpy".
        name: in words.
        gpu: whether it is a GPU, for which more is measured.
    """

    framework: str
    name: str
    gpu: bool

    @property
    def dtypes(self) -> tuple[str, ...]:
        return ("float32", "float16") if self.framework == "numpy" else ("float32", "float16", "bfloat16")

    def put(self, x: NDArray[Any], dtype: str | None = None) -> Any:
        """An array on the device; of `dtype` by its name, or of the array's own."""
        if self.framework == "mlx":
            import mlx.core as mx

            made = mx.array(x)
            return made if dtype is None else made.astype(getattr(mx, dtype))
        if self.framework == "torch":
            import torch

            made = torch.from_numpy(np.ascontiguousarray(x)).to("cuda" if self.gpu else "cpu")
            return made if dtype is None else made.to(getattr(torch, dtype))
        return np.array(x) if dtype is None else x.astype(dtype)

    def host(self, x: Any) -> NDArray[Any]:
        """A NumPy array, half precision as float32; waits for the device."""
        if self.framework == "mlx":
            import mlx.core as mx

            return np.array(x.astype(mx.float32) if x.dtype in (mx.float16, mx.bfloat16) else x)
        if self.framework == "torch":
            return (x.float() if x.dtype.is_floating_point else x).cpu().numpy()
        return x.astype(np.float32) if x.dtype == np.float16 else x


def device(name: str) -> Device:
    """The device by its name on the command line; "auto" is MLX's GPU, else torch's, else the CPU.

    Raises:
        Skipped: it is not here.
    """
    has_mlx, has_torch = (importlib.util.find_spec(x) is not None for x in ("mlx", "torch"))
    if has_mlx and name in ("auto", "metal", "mlx"):
        import mlx.core as mx

        gpu = mx.default_device().type == mx.gpu
        kind = "Metal" if mx.metal.is_available() else "CUDA" if gpu else "CPU"
        if gpu or name == "mlx" or (name == "auto" and not has_torch):
            return Device("mlx", f"MLX {mx.__version__}, {kind}", gpu)
    if has_torch and name in ("auto", "cuda"):
        import torch

        if torch.cuda.is_available():
            return Device("torch", f"torch {torch.__version__}, {torch.cuda.get_device_name()}", True)
    if name in ("auto", "cpu"):
        return Device("mlx", "MLX, CPU", False) if has_mlx else Device("numpy", f"NumPy {np.__version__}, CPU", False)
    raise Skipped(f"device {name} is not available here")
