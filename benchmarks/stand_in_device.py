"""A CUDA device that is not there: the launchers run as on a GPU, on tensors in the host's memory, and nothing is
launched. What is measured with it is the host time of a launch without the driver's part and without CUDA's allocator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from forgeattention.backends import cuda
from forgeattention.backends.cuda import launch, nvrtc, plans
from forgeattention.ops import registry


def _launched(*_: Any) -> tuple[int]:
    """In the place of cuLaunchKernel."""
    return (0,)


def _kernel(stem: str, macros: nvrtc.Macros, device: Any, shared_bytes: int) -> nvrtc.Kernel:
    kernel = object.__new__(nvrtc.Kernel)
    kernel.stem, kernel.shared_bytes = stem, shared_bytes
    kernel._function, kernel._launch = object(), _launched
    return kernel


def _available() -> tuple[bool, str]:
    return True, "stand-in"


def _device() -> None:
    """The number of a CPU tensor's device."""


def _stream(device: Any) -> int:
    return 0


def _limits(device: Any, *names: str) -> tuple[int, ...]:
    return tuple(vars(plans.Limits()).values())


@contextmanager
def stand_in() -> Iterator[None]:
    """Within it, backend "cuda" takes torch tensors of the CPU."""
    reads = {**registry.READS, "cuda": ("cpu", "cuda")}
    registry.find.cache_clear()
    registry.of_torch.cache_clear()
    with (
        mock.patch.object(registry, "READS", reads),
        mock.patch.object(cuda, "available", _available),
        mock.patch.object(torch.cuda, "current_device", _device),
        mock.patch.object(torch._C, "_cuda_getDevice", _device, create=True),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", _stream, create=True),
        mock.patch.object(nvrtc, "kernel", _kernel),
        mock.patch.object(nvrtc, "attributes", _limits),
    ):
        launch.limits.cache_clear()
        try:
            yield
        finally:
            launch.limits.cache_clear()
            registry.find.cache_clear()
            registry.of_torch.cache_clear()
