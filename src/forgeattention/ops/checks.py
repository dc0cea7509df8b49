"""Argument checks shared by the ops. Each raises ValueError "[op] expected ...; got ..."."""

from __future__ import annotations

from typing import Any

from ..codec.codec import Codec
from ..codec.spec import PAGE
from .arrays import FLOATS, device_of, dtype_of
from .table import ExactTokens, PageTable


def fail(op: str, expected: str, got: object) -> ValueError:
    return ValueError(f"[{op}] expected {expected}; got {got}")


def describe(x: Any) -> str:
    """Type and shape of an argument, for messages."""
    return f"{dtype_of(x)} {list(x.shape)}" if hasattr(x, "dtype") and hasattr(x, "shape") else repr(type(x).__name__)


_passed: set[Any] = set()
"""Looks that passed an op's checks: in a decode loop they are those of every step."""


def looks(op: str, *arrays: Any, **others: Any) -> Any:
    """All that an op's checks of classes, shapes and dtypes ask, to be compared; None where something is no array, or
    where a size is a tracer's symbol.

    Args:
        op: the op's name.
        arrays: its arrays.
        others: what else its checks look at, hashable.
    """
    try:
        asked = op, *[(type(x), x.shape, x.dtype) for x in arrays], *others.values()
        hash(asked)
    except (AttributeError, TypeError):
        return None
    return asked


def passed(asked: Any) -> bool:
    """Whether arguments of these looks passed before."""
    return asked is not None and asked in _passed


def note_passed(asked: Any) -> None:
    """Remembers looks that passed all of their op's checks."""
    if asked is None:
        return
    if len(_passed) >= 4096:
        _passed.clear()
    _passed.add(asked)


def check_codec(op: str, codec: Any) -> None:
    if not isinstance(codec, Codec):
        raise fail(op, "a Codec", type(codec).__name__)


def check_floats(op: str, name: str, x: Any, rank: int) -> None:
    """A float array of `rank` axes."""
    if not device_of(x):
        raise fail(op, f"{name} as a NumPy, torch or MLX array", type(x).__name__)
    if dtype_of(x) not in FLOATS or len(x.shape) != rank:
        raise fail(op, f"{name} of {', '.join(FLOATS)} with {rank} axes", describe(x))


def check_vectors(op: str, name: str, x: Any, codec: Codec, rank: int, heads: int | None) -> None:
    """A float array of `rank` axes whose last is head_dim and, with `heads`, whose axis -3 is that."""
    if not device_of(x):
        raise fail(op, f"{name} as a NumPy, torch or MLX array", type(x).__name__)
    if dtype_of(x) not in FLOATS:
        raise fail(op, f"{name} of {', '.join(FLOATS)}", dtype_of(x))
    shape = x.shape
    if len(shape) != rank or shape[-1] != codec.head_dim or (heads is not None and shape[-3] != heads):
        want = ["batch"] * (rank - 3) + [str(heads or "heads"), "n", str(codec.head_dim)]
        raise fail(op, f"{name} [{', '.join(want)}]", list(shape))


def check_queries(op: str, q: Any, codec: Codec) -> None:
    asked = looks("queries", q, head_dim=codec.head_dim, kv_heads=codec.kv_heads)
    if passed(asked):
        return
    check_vectors(op, "q", q, codec, 4, None)
    if q.shape[1] == 0 or q.shape[1] % codec.kv_heads:
        raise fail(op, f"q_heads a multiple of {codec.kv_heads} kv_heads", q.shape[1])
    note_passed(asked)


def check_index(op: str, name: str, x: Any, dtype: str, shape: tuple[int | str, ...]) -> None:
    """An integer array; a string in `shape` stands for any size."""
    if not device_of(x) or dtype_of(x) != dtype or len(x.shape) != len(shape):
        raise fail(op, f"{name} {dtype} {_shape(shape)}", describe(x))
    for have, want in zip(x.shape, shape, strict=True):
        if isinstance(want, int) and have != want:
            raise fail(op, f"{name} {dtype} {_shape(shape)}", describe(x))


def check_table(op: str, table: Any, batch: int | None, like: Any = None) -> None:
    """A PageTable of `batch` rows (any number if None) on the device of `like`."""
    if not isinstance(table, PageTable):
        raise fail(op, "a PageTable", type(table).__name__)
    seen = batch, "" if like is None else device_of(like)
    if seen in table.checked:
        return
    rows: int | str = "batch" if batch is None else batch
    check_index(op, "table.lengths", table.lengths, "int32", (rows,))
    check_index(op, "table.page_table", table.page_table, "int64", (table.lengths.shape[0], "max_pages"))
    if not 0 <= table.max_length <= table.page_table.shape[1] * PAGE:
        raise fail(op, f"table.max_length within {table.page_table.shape[1]} pages of {PAGE}", table.max_length)
    if table.base is not None and dtype_of(table.base) != "uint8":
        raise fail(op, "table.base uint8", describe(table.base))
    for name in ("base", "page_table", "lengths"):
        array = getattr(table, name)
        if like is not None and array is not None and device_of(array) != device_of(like):
            raise fail(op, f"table.{name} on {device_of(like)}", device_of(array))
    table.checked.add(seen)


def check_exact(op: str, exact: Any, codec: Codec, q: Any) -> None:
    """An ExactTokens that belongs to the queries q."""
    if not isinstance(exact, ExactTokens):
        raise fail(op, "an ExactTokens", type(exact).__name__)
    batch = q.shape[0]
    seen = batch, codec.kv_heads, codec.head_dim, device_of(q)
    if seen not in exact.checked:
        check_vectors(op, "exact.k", exact.k, codec, 4, codec.kv_heads)
        if exact.v.shape != exact.k.shape or dtype_of(exact.v) != dtype_of(exact.k):
            raise fail(op, f"exact.v {describe(exact.k)} like exact.k", describe(exact.v))
        if exact.k.shape[0] != batch:
            raise fail(op, f"exact.k of {batch} rows", exact.k.shape[0])
        check_index(op, "exact.lengths", exact.lengths, "int32", (batch,))
        for name in ("k", "v", "lengths"):
            if device_of(getattr(exact, name)) != seen[3]:
                raise fail(op, f"exact.{name} on {seen[3]}", device_of(getattr(exact, name)))
        exact.checked.add(seen)
    capacity = exact.k.shape[2]
    if not 0 <= exact.max_length <= capacity:
        raise fail(op, f"exact.max_length within the capacity {capacity}", exact.max_length)


def check_scale(op: str, scale: Any) -> float:
    value = float(scale)
    if not 0 < value < float("inf"):
        raise fail(op, "a positive finite softmax scale", scale)
    return value


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def check_packed_queries(op: str, q: Any, codec: Codec, table: PageTable, scale: float) -> float:
    """What ops of queries over packed tokens alone have in common; gives the scale as a float.

    Raises:
        ValueError: an argument that does not fit the others.
    """
    check_codec(op, codec)
    check_queries(op, q, codec)
    scale = check_scale(op, scale)
    check_table(op, table, q.shape[0], q)
    return scale
