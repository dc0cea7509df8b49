"""CUDA kernels compiled at run time by NVRTC, kept on disk, and launched on torch's current stream."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from ...util.files import replaced
from ...util.folders import cache_folder
from .params import STRUCTS

KERNELS = Path(__file__).parents[2] / "kernels"
Macros = tuple[tuple[str, str], ...]


@lru_cache
def available() -> tuple[bool, str]:
    """Whether kernels can be compiled and run here, and what on or why not."""
    try:
        import torch
    except ImportError:
        return False, "PyTorch is not installed"
    if not torch.cuda.is_available():
        return False, "PyTorch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    if major < 8:
        return False, f"{name} has compute capability {major}.{minor}; 8.0 or newer is needed"
    usable, versions = toolchain()
    return usable, f"{name}, sm_{major}{minor}, {versions}" if usable else versions


@lru_cache
def available_to_mlx() -> tuple[bool, str]:
    """Whether this process can launch CUDA kernels from MLX, and what on or why not."""
    try:
        import mlx.core as mx
    except ImportError as error:
        return False, f"MLX is not installed ({error})"
    if not mx.cuda.is_available():
        return False, f"MLX {mx.__version__} without a CUDA device"
    usable, versions = toolchain()
    if not usable:
        return False, versions
    major, minor = capability(0)
    if major < 8:
        return False, f"compute capability {major}.{minor}; 8.0 or newer is needed"
    return True, f"MLX {mx.__version__} on sm_{major}{minor}, {versions}"


def toolchain() -> tuple[bool, str]:
    """Whether kernels can be compiled and a driver answers, and the versions or what is missing."""
    try:
        from cuda.bindings import driver, nvrtc

        _compiler()
        _, *version = nvrtc.nvrtcVersion()
        error, api = driver.cuDriverGetVersion()
    except (ImportError, OSError, RuntimeError) as failure:
        return False, f"cuda-core and NVRTC do not load ({failure}); install forgeattention[cuda]"
    if int(error):
        return False, f"the CUDA driver does not answer ({error.name})"
    return True, f"NVRTC {'.'.join(map(str, version))}, driver API {api // 1000}.{api % 1000 // 10}"


def _compiler() -> tuple[Any, Any]:
    """Program and ProgramOptions of cuda-core, whose module was named "experimental" before version 1."""
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError:
        from cuda.core.experimental import Program, ProgramOptions
    return Program, ProgramOptions


def architecture(major: int, minor: int) -> str:
    """The compile target of a device; "a" for Hopper's own instructions."""
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


@lru_cache
def source(stem: str, mlx_outputs: tuple[str, ...] = ()) -> str:
    """The text of a kernel: `struct Params` by its table (params.py), then kernels/cuda/<stem>.cu.

    Args:
        stem: of the file.
        mlx_outputs: members of Params that MLX allocates; with them the kernel is called mlx_<stem> and has MLX's
            parameters (`structs.Struct.mlx_entry`).
    """
    params = STRUCTS[stem]
    entry = params.mlx_entry(stem, mlx_outputs) if mlx_outputs else ""
    body = (KERNELS / "cuda" / f"{stem}.cu").read_text()
    return f'{entry}#include "common.cuh"\n{params.text}#line 1 "{stem}.cu"\n{body}'


@lru_cache
def _includes() -> str:
    """SHA-256 of all that kernels may include."""
    digest = hashlib.sha256()
    for path in sorted([*(KERNELS / "cuda").glob("*.cuh"), *(KERNELS / "shared").glob("*.h")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def compile_kernel(stem: str, macros: Macros, arch: str, mlx_outputs: tuple[str, ...] = ()) -> bytes:
    """The cubin of `source` under these macros. Needs NVRTC but no device.

    Raises:
        RuntimeError: the compiler's log.
    """
    program_type, options_type = _compiler()
    options = options_type(
        std="c++17",
        arch=arch,
        include_path=[str(KERNELS), str(KERNELS / "cuda")],
        define_macro=[(name, value) for name, value in macros] or None,
    )
    try:
        return bytes(program_type(source(stem, mlx_outputs), "c++", options).compile("cubin").code)
    except Exception as failure:
        raise RuntimeError(f"[{stem}] NVRTC failed for {arch} with {dict(macros)}: {failure}") from failure


def cubin(stem: str, macros: Macros, arch: str, mlx_outputs: tuple[str, ...] = ()) -> bytes:
    """As `compile_kernel`, from the disk if it was compiled before by this NVRTC from these sources."""
    from cuda.bindings import nvrtc

    _, *version = nvrtc.nvrtcVersion()
    text = source(stem, mlx_outputs), _includes(), macros, arch, version
    key = hashlib.sha256(repr(text).encode()).hexdigest()[:40]
    path = cache_folder("cuda") / f"{stem}-{arch}-{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    code = compile_kernel(stem, macros, arch, mlx_outputs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            Path(temporary).write_bytes(code)
    except OSError:
        pass  # a cache that cannot be written costs time only
    return code


@cache
def _compilers() -> ThreadPoolExecutor:
    """As many threads as this process has cores: NVRTC holds no lock of Python's while it compiles."""
    _compiler()  # threads that import cuda-core at once find it half made
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(cores, "nvrtc")


@cache
def _started(stem: str, macros: Macros, arch: str) -> Future[bytes]:
    return _compilers().submit(cubin, stem, macros, arch)


def start(kernels: Iterable[tuple[str, Macros]], arch: str) -> list[Future[bytes]]:
    """Begins to compile kernels side by side, and returns at once; each is begun once in a process.

    Args:
        kernels: stem and macros of each.
        arch: as `architecture` names it.

    Returns:
        What `cubin` will give for each.
    """
    return [_started(stem, macros, arch) for stem, macros in kernels]


def _check(result: tuple[Any, ...], what: str) -> Any:
    error, *values = result
    if int(error):
        raise RuntimeError(f"[cuda] {what} failed: {error.name}")
    return values[0] if len(values) == 1 else values


def attributes(device: int, *names: str) -> list[int]:
    """Attributes of a device, by their names in the driver API without its CU_DEVICE_ATTRIBUTE_."""
    from cuda.bindings import driver

    kinds = driver.CUdevice_attribute
    _check(driver.cuInit(0), "starting the driver")
    return [
        int(_check(driver.cuDeviceGetAttribute(getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{name}"), device), name))
        for name in names
    ]


@cache
def capability(device: int) -> tuple[int, int]:
    """The compute capability of a device, asked of the driver."""
    major, minor = attributes(device, "COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR")
    return major, minor


class Kernel:
    """A loaded kernel. `launch` passes one structure, which the kernel takes as its only parameter."""

    def __init__(self, stem: str, macros: Macros, arch: str, shared_bytes: int) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._launch = driver.cuLaunchKernel
        self.stem, self.shared_bytes = stem, shared_bytes
        (code,) = start([(stem, macros)], arch)
        self._library = _check(driver.cuLibraryLoadData(code.result(), None, None, 0, None, None, 0), f"loading {stem}")
        kernel = _check(driver.cuLibraryGetKernel(self._library, stem.encode()), f"finding {stem}")
        self._function = _check(driver.cuKernelGetFunction(kernel), f"finding {stem}")
        attribute = driver.CUfunction_attribute
        if shared_bytes > 48 * 1024:
            _check(
                driver.cuFuncSetAttribute(
                    self._function, attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes
                ),
                f"asking for {shared_bytes} bytes of shared memory for {stem}",
            )
        self.registers = _check(driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, self._function), stem)
        self.local_bytes = _check(
            driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, self._function), stem
        )

    def occupancy(self, threads: int) -> int:
        """CTAs of this many threads that fit a multiprocessor."""
        return int(
            _check(
                self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, threads, self.shared_bytes),
                self.stem,
            )
        )

    def launch(self, grid: tuple[int, int, int], threads: int, stream: int, params: int) -> None:
        """Launches on a stream.

        Args:
            grid: CTAs in x, y, z.
            threads: of a CTA.
            stream: the driver's.
            params: what a function of `structs.Struct.packer` gave.
        """
        (error,) = self._launch(self._function, *grid, threads, 1, 1, self.shared_bytes, stream, params, 0)
        if error:
            raise RuntimeError(f"[{self.stem}] launch failed: {error.name}")


def architecture_of(device: Any = None) -> str:
    """The architecture of one of torch's devices, of the current one if None."""
    import torch

    return architecture(*torch.cuda.get_device_capability(device))


@cache
def kernel(stem: str, macros: Macros, device: int, shared_bytes: int) -> Kernel:
    """The kernel for a device, compiled or read from disk on first use. Call it under that device."""
    return Kernel(stem, macros, architecture_of(device), shared_bytes)
