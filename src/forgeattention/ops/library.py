"""The ops as operators of torch.library, `torch.ops.forgeattention`, for torch.compile and torch.export.

Eager calls do not come here. While torch traces a call, the public function becomes one of these operators, which names
the codec by its handle; at run time the operator calls the public function with all its checks. Gradients do not flow.

A tracer orders operators by the tensors that they read and write. Pages at absolute addresses (`table.base` None) are
none, so traced code may read them but must not write them: a traced `encode` wants `out`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..codec.codec import Codec, codec_of
from .arrays import dtype_name
from .checks import fail
from .decode_attention import decode_attention as _decode_attention
from .decode_pages import decode_pages as _decode_pages
from .encode import encode as _encode
from .prefill_attention import prefill_attention as _prefill_attention
from .qk_scores import qk_scores as _qk_scores
from .table import ExactTokens, PageTable
from .value_sum import value_sum as _value_sum

_DEVICES = ("cpu", "cuda")


def _tokens(table: PageTable) -> tuple[Tensor | None, Tensor, Tensor, int]:
    return table.base, table.offsets, table.lengths, table.max_length


@torch.library.custom_op("forgeattention::encode", mutates_args=("out",), device_types=_DEVICES)
def _op_encode(k: Tensor, v: Tensor, codec: str, out: Tensor, offsets: Tensor, backend: str) -> None:
    _encode(k, v, codec_of(codec), out, offsets, backend=backend)


@_op_encode.register_fake
def _(k: Tensor, v: Tensor, codec: str, out: Tensor, offsets: Tensor, backend: str) -> None:
    return None


def encode(k: Any, v: Any, codec: Codec, out: Any, offsets: Any, backend: str) -> None:
    if out is None:
        raise fail("encode", "out, a tensor, in traced code", None)
    _op_encode(k, v, codec.handle, out, offsets, backend)


@torch.library.custom_op("forgeattention::decode_pages", mutates_args=(), device_types=_DEVICES)
def _op_decode_pages(
    codec: str,
    base: Tensor | None,
    offsets: Tensor,
    lengths: Tensor,
    max_length: int,
    dtype: str,
    rotated: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    table = PageTable(base, offsets, lengths, max_length)
    return _decode_pages(codec_of(codec), table, dtype=dtype, rotated=rotated, backend=backend)


@_op_decode_pages.register_fake
def _(
    codec: str,
    base: Tensor | None,
    offsets: Tensor,
    lengths: Tensor,
    max_length: int,
    dtype: str,
    rotated: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    known = codec_of(codec)
    width = known.format.padded_dim if rotated else known.head_dim
    shape = lengths.shape[0], known.kv_heads, max_length, width
    k, v = (lengths.new_empty(shape, dtype=getattr(torch, dtype)) for _ in range(2))
    return k, v


def decode_pages(codec: Codec, table: PageTable, dtype: Any, rotated: bool, backend: str) -> tuple[Tensor, Tensor]:
    return _op_decode_pages(codec.handle, *_tokens(table), dtype_name(dtype), rotated, backend)


@torch.library.custom_op("forgeattention::decode_attention", mutates_args=(), device_types=_DEVICES)
def _op_decode_attention(
    q: Tensor,
    codec: str,
    base: Tensor | None,
    offsets: Tensor | None,
    lengths: Tensor | None,
    max_length: int,
    exact_k: Tensor | None,
    exact_v: Tensor | None,
    exact_lengths: Tensor | None,
    exact_max_length: int,
    scale: float,
    causal: bool,
    sink_logits: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    table = None if lengths is None else PageTable(base, offsets, lengths, max_length)
    exact = None if exact_k is None else ExactTokens(exact_k, exact_v, exact_lengths, exact_max_length)
    options: dict[str, Any] = {"causal": causal, "sink_logits": sink_logits, "backend": backend}
    return _decode_attention(q, codec_of(codec), table, exact, scale, **options)


@_op_decode_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def decode_attention(
    q: Tensor,
    codec: Codec,
    table: PageTable | None,
    exact: ExactTokens | None,
    scale: float,
    causal: bool,
    sink_logits: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    packed = (None, None, None, 0) if table is None else _tokens(table)
    recent = (None, None, None, 0) if exact is None else (exact.k, exact.v, exact.lengths, exact.max_length)
    return _op_decode_attention(q, codec.handle, *packed, *recent, scale, causal, sink_logits, backend)


@torch.library.custom_op("forgeattention::prefill_attention", mutates_args=(), device_types=_DEVICES)
def _op_prefill_attention(
    q: Tensor,
    codec: str,
    base: Tensor | None,
    offsets: Tensor,
    lengths: Tensor,
    max_length: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    table = PageTable(base, offsets, lengths, max_length)
    return _prefill_attention(q, codec_of(codec), table, scale, backend=backend)


@_op_prefill_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape, dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)


def prefill_attention(q: Tensor, codec: Codec, table: PageTable, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    return _op_prefill_attention(q, codec.handle, *_tokens(table), scale, backend)


@torch.library.custom_op("forgeattention::qk_scores", mutates_args=(), device_types=_DEVICES)
def _op_qk_scores(
    q: Tensor,
    codec: str,
    base: Tensor | None,
    offsets: Tensor,
    lengths: Tensor,
    max_length: int,
    scale: float,
    backend: str,
) -> Tensor:
    return _qk_scores(q, codec_of(codec), PageTable(base, offsets, lengths, max_length), scale, backend=backend)


@_op_qk_scores.register_fake
def _(q: Tensor, codec: str, base: Any, offsets: Any, lengths: Any, max_length: int, *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], max_length), dtype=torch.float32)


def qk_scores(q: Tensor, codec: Codec, table: PageTable, scale: float, backend: str) -> Tensor:
    return _op_qk_scores(q, codec.handle, *_tokens(table), scale, backend)


@torch.library.custom_op("forgeattention::value_sum", mutates_args=(), device_types=_DEVICES)
def _op_value_sum(
    p: Tensor, codec: str, base: Tensor | None, offsets: Tensor, lengths: Tensor, max_length: int, backend: str
) -> Tensor:
    return _value_sum(p, codec_of(codec), PageTable(base, offsets, lengths, max_length), backend=backend)


@_op_value_sum.register_fake
def _(p: Tensor, codec: str, *_: Any) -> Tensor:
    return p.new_empty((*p.shape[:3], codec_of(codec).head_dim))


def value_sum(p: Tensor, codec: Codec, table: PageTable, backend: str) -> Tensor:
    return _op_value_sum(p, codec.handle, *_tokens(table), backend)
