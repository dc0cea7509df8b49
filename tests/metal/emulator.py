"""Runs Metal kernels on the CPU and checks what a GPU would leave undefined.

The text of a kernel is assembled exactly as `mx.fast.metal_kernel` does it (mlx/backend/common/metal_kernel.cpp),
translated to C++ by a few textual rewrites (msl.py), compiled against the headers in shim/ and run with one fiber per
thread, which yields only at barriers and simd operations. Faults end the launch with an `EmulatorError` whose `kind`
is one of:

    out_of_bounds, misaligned, uninitialised, race, barrier_divergence, simd_divergence, unwritten_output,
    threadgroup_memory (more than 32 KB), launch (an impossible grid or threadgroup), undefined (an index outside a
    thread-private array, a shift by too many bits, a division by zero), translation, compile.

Limits. Checked pointers exist for the patterns `device T*`, `threadgroup T*`, `constant T*` with `const` on either
side; a component of an element of writable memory (`out[i].x`) and pointers to such pointers do not compile.
Threadgroup variables must be one-dimensional arrays and stand in the body, the kernel function itself, as Metal
demands. Two simd operations of one name on one line count as the same one. Order is checked per declared element;
atomics are not modelled. Floating point is the CPU's: IEEE, no contraction, subnormals kept, transcendental functions
nearly exact, which a GPU's are not. Uninitialised private variables are not seen.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .msl import Array, BFloat16, EmulatorError, Template, entry_point, mlx_source, translate

__all__ = ["BFloat16", "EmulatorError", "mlx_source", "run_kernel"]

SHIM = Path(__file__).parent / "shim"
CXX = os.environ.get("CXX", "g++")
FLAGS = [
    "-std=gnu++14",
    "-O2",
    "-fPIC",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",
    "-march=native",
    "-fsigned-char",
]
KERNEL_FLAGS = [
    *FLAGS,
    "-fvisibility=hidden",
    "-fno-gnu-unique",  # one process loads many kernels with one set of names
    "-fsingle-precision-constant",
    "-fno-strict-aliasing",
    "-fno-threadsafe-statics",
    "-fsanitize=bounds,shift-exponent,integer-divide-by-zero",
    "-Wall",
    "-Werror",
    *(f"-Wno-{w}" for w in ("attributes", "c++17-extensions", "literal-suffix", "unknown-pragmas", "sign-compare")),
    *(f"-Wno-{w}" for w in ("unused-function", "unused-variable", "maybe-uninitialized", "strict-aliasing")),
]


@cache
def _cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"forgeattention-metal-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _run_compiler(arguments: list[str]) -> None:
    done = subprocess.run([CXX, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise EmulatorError("compile", "\n".join(done.stderr.splitlines()[:40]))


@cache
def _shim_key() -> str:
    parts = [CXX, *KERNEL_FLAGS, *(f.read_text() for f in sorted(SHIM.iterdir()) if f.is_file())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@cache
def _shim_folder() -> Path:
    """The folder with the runtime and the precompiled headers, built once per content."""
    folder = _cache_folder() / f"shim-{_shim_key()}"
    if not folder.exists():
        build = Path(tempfile.mkdtemp(dir=_cache_folder()))
        for f in SHIM.glob("*.h"):
            shutil.copy(f, build)
        _run_compiler([*FLAGS, "-shared", str(SHIM / "runtime.cpp"), "-o", str(build / "libruntime.so")])
        header = ["-x", "c++-header", str(build / "metal_stdlib.h"), "-o", str(build / "metal_stdlib.h.gch")]
        _run_compiler([*KERNEL_FLAGS, *header])
        try:
            build.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(build)
    return folder


@cache
def _library(cpp: str) -> ctypes.CDLL:
    key = hashlib.sha256(f"{_shim_key()}\0{cpp}".encode()).hexdigest()[:32]
    path = _cache_folder() / f"{key}.so"
    if not path.exists():
        shim = _shim_folder()
        with tempfile.TemporaryDirectory(dir=_cache_folder()) as scratch:
            unit, obj, library = (Path(scratch) / f"kernel.{e}" for e in ("cpp", "o", "so"))
            unit.write_text(cpp)
            flags = ["-I", str(shim), "-include", "metal_stdlib.h"]
            _run_compiler([*KERNEL_FLAGS, *flags, "-c", str(unit), "-o", str(obj)])
            _run_compiler(["-shared", str(obj), "-L", str(shim), "-lruntime", f"-Wl,-rpath,{shim}", "-o", str(library)])
            library.replace(path)
    return ctypes.CDLL(str(path))


class _Region(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("cells", ctypes.c_void_p),
        ("granule", ctypes.c_uint32),
        ("space", ctypes.c_uint8),
        ("initialised", ctypes.c_bool),
        ("bytes_read", ctypes.c_uint64),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("regions", ctypes.POINTER(_Region)),
        ("region_count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("error_kind", ctypes.c_char * 32),
        ("error", ctypes.c_char * 1024),
    ]


_CELL_BYTES = 36


def _aligned(data: NDArray) -> NDArray[np.uint8]:
    """A copy of the array's bytes at a 256-byte boundary, where Metal buffers start."""
    raw = np.ascontiguousarray(data)
    room = np.empty(raw.nbytes + 256, np.uint8)
    start = -room.ctypes.data % 256
    room[start : start + raw.nbytes] = raw.reshape(-1).view(np.uint8)
    return room[start : start + raw.nbytes]


def run_kernel(
    name: str,
    source: str,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, tuple[Sequence[int], str]],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    template: Template = (),
    header: str = "",
    init_value: float | None = None,
    bytes_read: dict[str, int] | None = None,
) -> list[Array]:
    """Runs a kernel as `mx.fast.metal_kernel(...)(...)` would launch it.

    Args:
        name: the kernel's name.
        source: the kernel's body.
        inputs: arrays by name, in order.
        outputs: (shape, dtype name) by name, in order.
        grid: threads in x, y, z (MLX counts threads, not threadgroups).
        threadgroup: threads of a threadgroup in x, y, z.
        template: template arguments in order.
        header: text before the kernel.
        init_value: what the outputs hold before the launch; with None every element must be written.
        bytes_read: gets, for each input by name, how many bytes all threads together loaded from it.

    Returns:
        The outputs in order; bfloat16 ones as `BFloat16`.

    Raises:
        EmulatorError: any fault listed at the top of this module, or text that does not compile.
    """
    dtypes = {key: dtype for key, (_, dtype) in outputs.items()}
    kernel, text = mlx_source(name, header, source, inputs, dtypes, template)
    cpp = f'#line 1 "{name}"\n' + translate(text, source) + entry_point(kernel, inputs, dtypes, source, template)
    library = _library(cpp)

    keep: list[NDArray] = []
    regions: list[_Region] = []

    def add(key: str, data: NDArray[np.uint8], granule: int, cells: NDArray | None = None, space: int = 0) -> None:
        keep.extend([data] if cells is None else [data, cells])
        at = None if cells is None else cells.ctypes.data
        regions.append(
            _Region(data.ctypes.data, data.nbytes, key.encode(), at, granule, space, init_value is not None, 0)
        )

    for key, array in inputs.items():
        data = array.bits if isinstance(array, BFloat16) else np.ascontiguousarray(array)
        add(key, _aligned(data), data.itemsize)
        if array.ndim > 0:
            strides = np.array(data.strides, np.int64) // data.itemsize
            facts = {
                "shape": np.array(data.shape, np.int32),
                "strides": strides,
                "ndim": np.array([data.ndim], np.int32),
            }
            for suffix, values in facts.items():
                if f"{key}_{suffix}" in source:
                    add(f"{key}_{suffix}", _aligned(values), values.itemsize)
    results: list[NDArray] = []
    for key, (shape, dtype) in outputs.items():
        numpy_dtype = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
        # 0xff bytes: NaN in every floating type, so that an unwritten element shows even if it is copied on
        fresh = np.full(int(np.prod(shape)) * numpy_dtype.itemsize, 0xFF, np.uint8).view(numpy_dtype)
        if init_value is not None:
            fresh = np.full(fresh.shape, init_value, numpy_dtype)
            if dtype == "bfloat16":
                fresh[:] = BFloat16.rounded(np.float32(init_value).reshape(1)).bits
        data = _aligned(fresh)
        add(key, data, numpy_dtype.itemsize, np.zeros(fresh.size * _CELL_BYTES, np.uint8))
        results.append(data.view(numpy_dtype).reshape(tuple(shape)))

    launch = _Launch((_Region * len(regions))(*regions), len(regions), grid, threadgroup)
    if library.msl_launch(ctypes.byref(launch)):
        raise EmulatorError(launch.error_kind.decode(), f"{name}: {launch.error.decode()}")
    if bytes_read is not None:
        bytes_read.update((r.name.decode(), r.bytes_read) for r in launch.regions[: len(regions)])
    return [BFloat16(r) if dtype == "bfloat16" else r for r, (_, dtype) in zip(results, outputs.values())]
