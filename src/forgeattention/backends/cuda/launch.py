"""What launches on torch tensors have in common: a codec's constants on a device, scratch, the stream.

Launches go to torch's current stream. No op but prefill of uneven rows waits for the device, and all can be captured in
CUDA graphs: lengths and page tables are read by the kernels, and launch shapes follow from the host's upper bounds.
Captured launches share scratch with the stream they were captured on: do not replay two graphs that were captured on
one stream at the same time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ...codec.codec import Codec
from ...ops.table import PageTable
from . import nvrtc
from .encoder import feedback_words
from .macros import Side
from .params import TRANSFORM
from .plans import LIMITS, Limits


@lru_cache
def limits(device: int) -> Limits:
    """What the device of this number offers to one launch."""
    return Limits(*nvrtc.attributes(device, *LIMITS))


class Constants:
    """A codec on a device.

    Attributes:
        encode, attend: its transforms of keys and of values, as bytes of `params.TRANSFORM`: for what encodes, and for
            queries and outputs.
        centred: those of `attend` without the centres.
        units: of the codebooks of keys and of values.
        launches: what launches of one kind have in common, by what the kinds differ in.
        feedback: where a shaped codec's feedback lies, or 0; words between heads, 0 if all share one.
    """

    def __init__(self, codec: Codec, device: Any) -> None:
        self._device = device
        self._keep: list[Any] = []
        self.launches: dict[Any, Any] = {}
        sides = codec.k_transform, codec.v_transform
        encode, attend = ([self._members(Side.of(codec, t, e)) for t in sides] for e in (True, False))
        self.encode, self.attend = ([TRANSFORM.pack(**members) for members in side] for side in (encode, attend))
        self.centred = [TRANSFORM.pack(**{**members, "mu": 0, "mu_stride": 0}) for members in attend]
        self.units = codec.k_codebook.unit, codec.v_codebook.unit
        self.feedback = 0, 0
        if codec.shaping is not None:
            words = feedback_words(codec)
            self.feedback = self._put(words.view(np.float32)), words.shape[1] if len(words) > 1 else 0

    def launch(self, key: Any, make: Callable[[], Any]) -> Any:
        """That of `launches`, made once."""
        found = self.launches.get(key)
        if found is None:
            found = self.launches[key] = make()
        return found

    def _put(self, array: Any) -> int:
        tensor = torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(self._device)
        self._keep.append(tensor)
        return int(tensor.data_ptr())

    def _members(self, side: Side) -> dict[str, int]:
        arrays = {name: getattr(side, name) for name in ("signs", "in_matrix", "out_matrix", "mu")}
        addresses = {name: 0 if x is None else self._put(x) for name, x in arrays.items()}
        return {**addresses, "stride": side.stride, "mu_stride": side.mu_stride}


_HERE: AbstractContextManager[None] = nullcontext()


def current_device() -> int:
    """The number of torch's current device; something lies on one, so CUDA is up."""
    # torch.cuda.current_device makes sure of that first, which takes as long again.
    return torch._C._cuda_getDevice()


def on_device(device: Any) -> AbstractContextManager[Any]:
    """Makes a device the current one; costs little where it is."""
    return _HERE if current_device() == device.index else torch.cuda.device(device)


def current_stream(device: Any) -> int:
    """torch's current stream on a device, as the driver knows it."""
    # torch.cuda.current_stream makes an object first, which takes ten times as long.
    return torch._C._cuda_getCurrentRawStream(device.index)


_constants: dict[tuple[int, Any], Constants] = {}
"""By the codec's id and the device, as long as the codec lives: a weak dictionary takes five times as long."""
_counters: dict[tuple[int, int], Any] = {}
_partials: dict[tuple[int, int], Any] = {}
_replaced: list[Any] = []
"""Scratch that was too small, and lies where it did."""


def constants_of(codec: Codec, device: Any) -> Constants:
    """The codec's constants on a device, made once."""
    key = id(codec), device
    found = _constants.get(key)
    if found is None:
        found = _constants[key] = Constants(codec, device)
        weakref.finalize(codec, _constants.pop, key, None)
    return found


def _scratch_of(kept: dict[tuple[int, int], Any], device: Any, stream: int, count: int, dtype: Any) -> Any:
    """A buffer of at least `count` elements, zero at first. One per stream: launches on one stream do not overlap."""
    key = (device.index, stream)
    have = kept.get(key)
    if have is None or have.numel() < count:
        if have is not None:
            _replaced.append(have)  # graphs captured with it may be replayed, blocks made with it are used no more
        have = kept[key] = torch.zeros(max(count, 65536), dtype=dtype, device=device)
    return have


def scratch_age() -> int:
    """Rises whenever scratch moves, so that addresses of it hold as long as this stays."""
    return len(_replaced)


def counters(device: Any, stream: int, count: int) -> int:
    """Address of `count` int32 counters that are zero; every launch leaves them so."""
    return _scratch_of(_counters, device, stream, count, torch.int32).data_ptr()


def partials(device: Any, stream: int, count: int) -> int:
    """Address of scratch for `count` float32 of partial results."""
    return _scratch_of(_partials, device, stream, count, torch.float32).data_ptr()


def address(x: Any) -> int:
    """Where a tensor's elements begin; 0 for None."""
    return 0 if x is None else x.data_ptr()


def aligned_rows(x: Any) -> Any:
    """The tensor with a contiguous last axis and rows that start at multiples of 16 bytes; a copy if it is not so."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    size = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(s % size == 0 for s, n in zip(x.stride()[:-1], x.shape[:-1]) if n > 1)
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def table_members(table: PageTable) -> dict[str, int]:
    """A table's members of a kernel's parameters, found out at its first use."""
    view = table.views.get("cuda")
    if view is None:
        view = table.views["cuda"] = {
            "base": address(table.base),
            "page_table": table.page_table.data_ptr(),
            "lengths": table.lengths.data_ptr(),
            "max_pages": table.page_table.stride(0),
        }
    return view
