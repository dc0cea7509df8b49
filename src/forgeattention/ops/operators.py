"""The ops as operators of torch.library, `torch.ops.forgeattention`, for torch.compile and torch.export.

Eager calls do not come here. While torch traces a call, an op becomes one of these operators; at run time the operator
calls the op's function with all its checks. Gradients do not flow.

An operator's arguments are the op's, spread out: a codec is named by its handle, a `PageTable` or another structure of
`ops.table` becomes its fields, in order, with names such as "table_lengths". Pages at absolute addresses (`base` None)
are no tensors, and a tracer orders operators by the tensors that they read and write: traced code may read such pages
but must not write them.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from types import NoneType
from typing import Any

import torch

from ..codec.codec import Codec, codec_of
from .arrays import Array, DType, dtype_name
from .checks import fail
from .registry import OPS, Op

DEVICES = ("cpu", "cuda")
_SCHEMA = {Array: "Tensor", bool: "bool", int: "SymInt", float: "float", str: "str"}


class Kind:
    """How an argument or a result of one type is spread out over values that a schema knows."""

    def schema(self, name: str) -> list[str]:
        """The declarations of its values."""
        raise NotImplementedError

    def spread(self, value: Any) -> list[Any]:
        raise NotImplementedError

    def join(self, values: Iterator[Any]) -> Any:
        """The argument again; takes as many values as `spread` gave."""
        raise NotImplementedError


class Plain(Kind):
    """A tensor, a number, a flag or a string."""

    def __init__(self, type_: Any, optional: bool) -> None:
        self.type = _SCHEMA[type_] + ("?" if optional else "")

    def schema(self, name: str) -> list[str]:
        return [f"{self.type} {name}"]

    def spread(self, value: Any) -> list[Any]:
        return [value]

    def join(self, values: Iterator[Any]) -> Any:
        return next(values)


class CodecHandle(Kind):
    def schema(self, name: str) -> list[str]:
        return [f"str {name}"]

    def spread(self, value: Codec) -> list[Any]:
        return [value.handle]

    def join(self, values: Iterator[Any]) -> Codec:
        return codec_of(next(values))


class DTypeName(Kind):
    def schema(self, name: str) -> list[str]:
        return [f"str {name}"]

    def spread(self, value: Any) -> list[Any]:
        return [dtype_name(value)]

    def join(self, values: Iterator[Any]) -> str:
        return next(values)


class NumberOrTensor(Kind):
    """An int, a tensor or None."""

    def schema(self, name: str) -> list[str]:
        return [f"SymInt? {name}", f"Tensor? {name}_tensor"]

    def spread(self, value: Any) -> list[Any]:
        return [None, value] if isinstance(value, torch.Tensor) else [value, None]

    def join(self, values: Iterator[Any]) -> Any:
        number, tensor = next(values), next(values)
        return number if tensor is None else tensor


class Fields(Kind):
    """A structure of `ops.table`, a pair of arrays, or None for either."""

    def __init__(self, make: Any, names: list[str], types: list[Any], optional: bool) -> None:
        self._make, self._names, self._optional = make, names, optional
        self._kinds = [_kind(type_, optional) for type_ in types]

    def schema(self, name: str) -> list[str]:
        return [x for field, kind in zip(self._names, self._kinds) for x in kind.schema(f"{name}_{field}")]

    def spread(self, value: Any) -> list[Any]:
        if value is None:
            return [None] * len(self._kinds)
        parts = value if isinstance(value, tuple) else [getattr(value, name) for name in self._names]
        return [x for part, kind in zip(parts, self._kinds) for x in kind.spread(part)]

    def join(self, values: Iterator[Any]) -> Any:
        parts = [kind.join(values) for kind in self._kinds]
        return None if self._optional and all(x is None for x in parts) else self._make(*parts)


def _kind(hint: Any, optional: bool = False) -> Kind:
    options = [hint]
    if NoneType in typing.get_args(hint):
        options, optional = [x for x in typing.get_args(hint) if x is not NoneType], True
    if set(options) == {int, Array}:
        return NumberOrTensor()
    (only,) = options
    if only is Codec:
        return CodecHandle()
    if only is DType:
        return DTypeName()
    if typing.get_origin(only) is tuple:
        types = list(typing.get_args(only))
        return Fields(lambda *parts: parts, [str(i) for i in range(len(types))], types, optional)
    if dataclasses.is_dataclass(only):
        fields = [field for field in dataclasses.fields(only) if field.init]
        hints = typing.get_type_hints(only, include_extras=True)
        return Fields(only, [f.name for f in fields], [hints[f.name] for f in fields], optional)
    return Plain(only, optional)


class Operator:
    """An op's operator."""

    def __init__(self, name: str, op: Op) -> None:
        hints = typing.get_type_hints(op.function, include_extras=True)
        result = hints.pop("return")
        signature = inspect.signature(op.function).parameters
        self._name, self._op = name, op
        self._parameters = list(signature)
        self._positional = [p.name for p in signature.values() if p.kind is not p.KEYWORD_ONLY]
        self._defaults = {p.name: p.default for p in signature.values() if p.default is not p.empty}
        self._kinds = {name: _kind(hints[name]) for name in self._parameters}
        self._result = None if result is NoneType else _kind(result)
        declared = []
        for i, parameter in enumerate(self._parameters):
            if parameter in op.mutates:
                declared.append(f"Tensor(a{i}!) {parameter}")
            else:
                declared += self._kinds[parameter].schema(parameter)
        outputs = [] if self._result is None else [x.split()[0] for x in self._result.schema("out")]
        returns = outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"
        self.call = torch.library.custom_op(
            f"forgeattention::{name}",
            self._run,
            mutates_args=op.mutates,
            device_types=DEVICES,
            schema=f"({', '.join(declared)}) -> {returns}",
        )
        self.call.register_fake(self._fake)

    def spread(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> list[Any]:
        """The operator's arguments, from those of the op."""
        given = {**self._defaults, **dict(zip(self._positional, arguments)), **options}
        for name in self._op.mutates:
            if given[name] is None:
                raise fail(self._name, f"{name}, a tensor, in traced code", None)
        return [x for name in self._parameters for x in self._kinds[name].spread(given[name])]

    def join(self, values: tuple[Any, ...]) -> Any:
        """The op's results, from those of the operator."""
        return None if self._result is None else self._result.join(iter(values))

    def _arguments(self, values: tuple[Any, ...]) -> tuple[list[Any], dict[str, Any]]:
        left = iter(values)
        given = {name: self._kinds[name].join(left) for name in self._parameters}
        return [given.pop(name) for name in self._positional], given

    def _run(self, *values: Any) -> Any:
        arguments, options = self._arguments(values)
        found = self._op.function(*arguments, **options)
        if self._result is None:
            return None
        # An operator's result may lie in no memory of an argument or of another result.
        taken = {x.untyped_storage().data_ptr() for x in values if isinstance(x, torch.Tensor)}
        out = []
        for x in self._result.spread(found):
            at = x.untyped_storage().data_ptr()
            out.append(x.clone() if at and at in taken else x)
            taken.add(at)
        return out[0] if len(out) == 1 else tuple(out)

    def _fake(self, *values: Any) -> Any:
        arguments, options = self._arguments(values)
        del options["backend"]
        found = self._op.fake(*arguments, **options)
        if self._result is None:
            return None
        out = self._result.spread(found)
        return out[0] if len(out) == 1 else tuple(out)


OPERATORS = {name: Operator(name, op) for name, op in OPS.items()}


def call(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The op `name` as an operator in traced code."""
    operator = OPERATORS[name]
    out = operator.call(*operator.spread(arguments, options))
    return operator.join(out if isinstance(out, tuple) else (out,))
