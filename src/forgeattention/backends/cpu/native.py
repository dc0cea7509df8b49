"""The native module of the CPU kernels (kernels/cpu), and codecs as it holds them."""

from __future__ import annotations

import importlib
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ...codec.codec import Codec
from ...codec.packing import key_orders
from ...codec.spec import CODES, SCALE_FORMATS, SCALE_RULES
from ...codec.transform import random_signs
from ...ops.threads import get_num_threads

try:
    native: Any = importlib.import_module("forgeattention._native")
    _missing = ""
except ImportError as error:
    native, _missing = None, f"the native module is not built ({error})"

_codecs: WeakKeyDictionary[Codec, Any] = WeakKeyDictionary()


def available() -> tuple[bool, str]:
    if native is None:
        return False, _missing
    return True, f"{native.isa()} (of {', '.join(native.isas())})"


def isas() -> list[str]:
    """Instruction sets of this processor and build, best first."""
    return native.isas()


def use_isa(name: str) -> None:
    """Use one of `isas()` from now on; the environment variable FORGEATTENTION_CPU_ISA does it from the start."""
    native.use_isa(name)


def shares_torch_threads() -> bool:
    """Whether the kernels run on PyTorch's own threads, as they do once it is loaded on Linux, or on this module's."""
    return native.shares_torch_threads()


def read_pass(data: NDArray[np.uint8]) -> int:
    """Reads every byte of a contiguous array once with the kernels' threads: the yardstick of the benchmarks."""
    return native.read_pass(data.ctypes.data, data.size, get_num_threads())


def native_codec(codec: Codec) -> Any:
    """The codec as the native module holds it, made once."""
    made = _codecs.get(codec)
    if made is None:
        made = _codecs[codec] = _make_codec(codec)
    return made


def _make_codec(codec: Codec) -> Any:
    spec, fmt = codec.spec, codec.format
    none = np.zeros(0, np.float32)
    hadamard = spec.rotation == "hadamard"
    k, v = codec.k_transform, codec.v_transform

    def columns(matrix: Any) -> Any:
        return none if hadamard else np.ascontiguousarray(matrix.transpose(0, 2, 1), np.float32)

    signs = random_signs(fmt.padded_dim, spec.seed).astype(np.float32)
    scales = np.ones((1, fmt.padded_dim), np.float32) if k.diagonal is None else k.diagonal
    return native.Codec(
        codec.head_dim,
        fmt.padded_dim,
        codec.kv_heads,
        SCALE_FORMATS.index(spec.scales),
        spec.key_mean,
        spec.refine,
        (spec.k_bits, CODES.index(fmt.k_code), codec.k_codebook.unit, SCALE_RULES.index(spec.k_scale_rule)),
        (spec.v_bits, CODES.index(fmt.v_code), codec.v_codebook.unit, SCALE_RULES.index(spec.v_scale_rule)),
        np.array(codec.k_codebook.levels, np.int8),
        np.array(codec.v_codebook.levels, np.int8),
        signs if hadamard else none,
        signs * scales,
        signs / scales,
        columns(k.forward),
        columns(k.inverse),
        none if hadamard else np.ascontiguousarray(k.inverse, np.float32),
        columns(v.forward),
        columns(v.inverse),
        none if k.mu is None else k.mu,
        none if v.mu is None else v.mu,
        *_by_rank(codec),
    )


def _by_rank(codec: Codec) -> tuple[Any, Any]:
    """The shaping's factors and weights with their channels in coding order."""
    shaping, none = codec.shaping, np.zeros(0, np.float32)
    if shaping is None:
        return none, none
    order, _ = key_orders(codec.format.padded_dim)
    number = np.arange(len(order))
    factor = shaping.factor[:, number[:, None, None], order[:, :, None], order[:, None, :]]
    return np.ascontiguousarray(factor), np.ascontiguousarray(shaping.weight[:, number[:, None], order])
