"""decode_pages: page records back to keys and values."""

from __future__ import annotations

from typing import Any

from ..codec.codec import Codec
from .arrays import FLOATS, dtype_name, traced
from .checks import check_codec, check_table, fail
from .dispatch import select
from .table import PageTable


def decode_pages(
    codec: Codec, table: PageTable, *, dtype: Any = "float32", rotated: bool = False, backend: str = "auto"
) -> tuple[Any, Any]:
    """Decode the tokens of a table.

    Args:
        codec: the layer's codec.
        table: the tokens.
        dtype: of the results, as a name or a framework's dtype.
        rotated: give the stored vectors y = A (x - mu), padded_dim wide, instead of x.
        backend: "auto" or a backend's name.

    Returns:
        k and v [batch, kv_heads, table.max_length, head_dim] in the framework of `table.lengths`; zero from each
        row's length on.
    """
    if traced():
        from . import library

        return library.decode_pages(codec, table, dtype, rotated, backend)
    check_codec("decode_pages", codec)
    check_table("decode_pages", table, None)
    name = dtype_name(dtype)
    if name not in FLOATS:
        raise fail("decode_pages", f"dtype of {', '.join(FLOATS)}", name)
    return select("decode_pages", table.lengths, backend)(codec, table, name, rotated)
