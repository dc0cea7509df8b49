"""The decorator that makes a function an op."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from .arrays import traced
from .registry import OPS, Op

Function = TypeVar("Function", bound=Callable[..., Any])


def op(fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[Function], Function]:
    """Registers a function as an op, by its name. Its annotations tell `ops.operators` the operator's schema.

    Args:
        fake, mutates: see `Op`.
    """

    def decorate(function: Function) -> Function:
        name = function.__name__
        OPS[name] = Op(function, fake, mutates)

        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if traced():
                from . import operators

                return operators.call(name, args, options)
            return function(*args, **options)

        return call  # type: ignore[return-value]

    return decorate
