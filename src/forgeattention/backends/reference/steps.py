"""encode_rows: see `forgeattention.ops.steps`."""

from __future__ import annotations

from typing import Any

from ...codec.codec import Codec
from ..steps import encode_rows as encode_rows_by
from .pages import encode


def encode_rows(k: Any, v: Any, codec: Codec, offsets: Any, out: Any) -> None:
    encode_rows_by(encode, k, v, codec, offsets, out)
