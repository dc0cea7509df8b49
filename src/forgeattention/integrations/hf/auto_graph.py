"""Caches that replay CUDA graphs of a model's decode steps by themselves.

`ForgeCache(model)` puts a `Forward` before the forward of a model on CUDA, for as long as such a cache lives. Calls
over other caches, and calls that are no decode steps, go to the model as they are.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from ...codec import PAGE
from .graph import NotLogitsAlone, StepGraph, refusal

if TYPE_CHECKING:
    from .cache import ForgeCache

log = logging.getLogger("forgeattention")

PATIENCE = 8
"""Decode steps in a row before one is captured: rows that come and go at every few steps are not worth it."""
ROOM = 4096
"""Tokens that a captured step can still take, at least; it is captured anew with twice the length after that."""


class AutoGraph(StepGraph):
    """Steps over one cache that are captured once there were several in a row."""

    def __init__(self, model: Any, cache: ForgeCache, forward: Callable[..., Any]) -> None:
        super().__init__(model, cache, 0, forward)
        self._model = weakref.ref(model)
        self._able = True
        self._waiting = PATIENCE
        # What the model was made of when its step was captured. The model itself is not among it: it may go.
        self._top: tuple[torch.nn.Module | None, ...] = ()
        self._modules: list[tuple[torch.nn.Module, tuple[torch.nn.Module | None, ...]]] = []
        self._weights: list[tuple[torch.Tensor, int]] = []
        self.eager = 0

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output, by a replay where that is possible."""
        given = self.arguments(args, kwargs)
        if not self._wanted(given):
            self.eager += 1
            return self.forward(*args, **kwargs)
        try:
            return self.step(given["input_ids"], given.get("position_ids"))
        except (RuntimeError, NotLogitsAlone) as error:
            if self.captured:
                raise
            log.warning("ForgeCache decodes without a CUDA graph: the model's step cannot be captured: %s", error)
            self.forget()
            self._able = False
            self.eager += 1
            return self.forward(*args, **kwargs)

    def _wanted(self, given: dict[str, Any]) -> bool:
        """Whether a call is to be replayed; captured steps that no longer fit are forgotten."""
        if not self._able or torch.is_grad_enabled() or not self.serves(given) or not self._plain():
            self._waiting = PATIENCE
            return False
        if self.captured and not self.ready(given["input_ids"]):
            self.forget()
            self._waiting = PATIENCE
        if self._waiting:
            self._waiting -= 1
            return False
        longest = max(layer.cache.rows.most_packed for layer in self.cache.layers)
        if self.captured and longest + 2 * PAGE > self.steps[0].max_tokens:
            self.forget()
        if not self.captured:
            self.max_length = max(2 * longest, longest + ROOM)
        return True

    def _plain(self) -> bool:
        """Whether the model has no hooks, which replays would not call, and the modules and weights that were captured.

        It is asked at every step: a walk over what was noted takes a fifth of the time of `model.modules()`.
        """
        model = self._model()
        assert model is not None
        if model.training or _has_hooks(model):
            return False
        if not self.captured:
            self._top = tuple(model._modules.values())
            below = (module for child in self._top if child is not None for module in child.modules())
            self._modules = [(module, tuple(module._modules.values())) for module in below]
            self._weights = [(p, p.data_ptr()) for p in model.parameters()]
        elif (
            tuple(model._modules.values()) != self._top
            or any(tuple(module._modules.values()) != inside for module, inside in self._modules)
            or any(p.data_ptr() != at for p, at in self._weights)
        ):
            self.forget()
            return False
        return not any(_has_hooks(module) for module, _ in self._modules)


def _has_hooks(module: torch.nn.Module) -> bool:
    """Whether a module has hooks besides those by which transformers collects outputs, which ask for nothing now."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not getattr(hook, "__module__", "").startswith("transformers.utils.") for hook in hooks)


class Forward:
    """What stands before a model's forward while caches replay graphs by themselves.

    Attributes:
        without_graphs: the model's forward.
    """

    def __init__(self, model: Any) -> None:
        find, before = weakref.ref(model), vars(model).get("forward")

        def without_graphs(*args: Any, **kwargs: Any) -> Any:
            model: Any = find()
            return type(model).forward(model, *args, **kwargs) if before is None else before(*args, **kwargs)

        self.__signature__ = without_graphs.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
        self.__doc__ = model.forward.__doc__
        self.without_graphs = without_graphs
        self._model, self._before = find, before
        self._graphs: weakref.WeakKeyDictionary[ForgeCache, AutoGraph] = weakref.WeakKeyDictionary()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        graph = self._graphs.get(cache) if isinstance(cache, Cache) else None
        if graph is None or torch.compiler.is_compiling():
            return self.without_graphs(*args, **kwargs)
        return graph.call(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied model has its own forward again."""
        copied = memo.get(id(self._model()))
        return self if copied is None else type(copied).forward.__get__(copied)

    def add(self, cache: ForgeCache) -> AutoGraph:
        model = self._model()
        graph = self._graphs[cache] = AutoGraph(model, cache, self.without_graphs)
        weakref.finalize(cache, self._removed).atexit = False
        return graph

    def _removed(self) -> None:
        """After a cache is gone: takes itself away with the last one."""
        model = self._model()
        if model is None or list(self._graphs) or vars(model).get("forward") is not self:
            return
        if self._before is None:
            del model.forward
        else:
            model.forward = self._before


def unfit(model: Any, cache: ForgeCache) -> str | None:
    """Why a model's steps over a cache are not captured, in words; None if they can be."""
    if model.device.type != "cuda":
        return f"a model on a CUDA device; got {model.device}"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "a model on one device; got one spread over several"
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        return "a model without adapters, which are switched unseen; got one with them"
    return refusal(cache)


def attach(model: Any, cache: ForgeCache) -> AutoGraph:
    """Makes the model's decode steps over a cache replay a graph from some steps on.

    Raises:
        ValueError: a model on another device, or a cache with layers that a graph cannot hold.
    """
    if (reason := unfit(model, cache)) is not None:
        raise ValueError(f"[decode_graph] expected {reason}")
    forward = vars(model).get("forward")
    if not isinstance(forward, Forward):
        forward = Forward(model)
        graph = forward.add(cache)
        model.forward = forward
        return graph
    return forward.add(cache)
