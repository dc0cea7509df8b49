"""Decoding by CUDA graph replay.

    cache = ForgeCache(model)
    with DecodeGraph(model, cache, max_length=40_000) as graph:
        model.generate(**inputs, past_key_values=cache, max_new_tokens=8_000)
    print(graph.replays, graph.eager)

A step of one token per row is captured once and replayed. Lengths and page tables lie on the device, and pages that
fill up are coded within the graph, those of different layers at different steps, so that all steps take alike. Prompts,
and every call that is not such a step, run as without the graph; `replays` and `eager` count them. The cache can be
used before and after as any other.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from ...cache.steps import StaticSteps, most_lead
from .layer import PackedLayer

if TYPE_CHECKING:
    from .cache import ForgeCache

log = logging.getLogger("forgeattention")

_READ = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
_IGNORED = {"return_dict", "cache_position"}
# Stands for the cache in what is kept of an output.
_CACHE = object()


class NotLogitsAlone(ValueError):
    """A model whose decode steps give more than a graph hands on."""


class StepGraph:
    """A model's decode steps over one cache, captured once and replayed. The cache is not kept alive.

    Args:
        model, cache: whose steps.
        max_length: most tokens of a row.
        forward: the model's own, which runs what is captured.

    Attributes:
        replays: steps that were replayed.
        steps: those of each layer, while a step is captured.

    Raises:
        ValueError: a model on another device, or layers that a graph cannot hold.
    """

    def __init__(self, model: Any, cache: ForgeCache, max_length: int, forward: Callable[..., Any]) -> None:
        self._check_device(model)
        if (reason := refusal(cache)) is not None:
            raise ValueError(f"[decode_graph] expected {reason}")
        self._find_cache = weakref.ref(cache)
        self.max_length, self.forward = max_length, forward
        self._signature = inspect.signature(forward)
        kinds = {p.kind: name for name, p in self._signature.parameters.items()}
        self._more = kinds.get(inspect.Parameter.VAR_KEYWORD, "")
        self.steps: list[StaticSteps] = []
        self._replay: Callable[[], None] | None = None
        self._ids: torch.Tensor | None = None
        self._positions: torch.Tensor | None = None
        self._real: tuple[Any, torch.Tensor] | None = None
        self._out: Any = None
        self.replays = 0

    def _check_device(self, model: Any) -> None:
        if model.device.type != "cuda":
            raise ValueError(f"[decode_graph] expected a model on a CUDA device; got {model.device}")

    @property
    def cache(self) -> ForgeCache:
        cache = self._find_cache()
        assert cache is not None
        return cache

    @property
    def captured(self) -> bool:
        """Whether there is a step to replay."""
        return self._replay is not None

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        given = self._signature.bind(*args, **kwargs).arguments
        return given | given.pop(self._more, {})

    def serves(self, given: dict[str, Any]) -> bool:
        """Whether a call is a decode step: one new, real token of every row, and nothing asked for but logits."""
        ids, mask, cache = given.get("input_ids"), given.get("attention_mask"), self.cache
        if given.get("past_key_values") is not cache or ids is None or ids.shape[1] != 1:
            return False
        if any(layer.cache is None or layer.cache.batch != ids.shape[0] for layer in cache.layers):
            return False
        others = [value for name, value in given.items() if name not in _READ | _IGNORED]
        if any(value is not None and value is not False for value in others) or given.get("return_dict") is False:
            return False
        keep = given.get("logits_to_keep", 0)
        if given.get("use_cache") is False or not isinstance(keep, int) or keep not in (0, 1):
            return False
        return mask is None or self._fits(mask)

    def _fits(self, mask: torch.Tensor) -> bool:
        """Whether a mask says that the new token is real and of the earlier ones what was said before. Waits for the
        device, as `generate` does after every step anyway."""
        layer = self.cache.layers[0]
        if mask.ndim != 2 or mask.shape[1] != layer.seen + 1:
            self._real = None
            return False
        if not layer.padded:
            return bool(mask.all())
        rows = layer.cache.rows
        if self._real is None or self._real[0] is not rows or self._real[1].shape[1] > layer.seen:
            self._real = rows, torch.from_numpy(layer.real(0, layer.seen)).to(mask.device)
        real = self._real[1]
        known = real.shape[1]
        return bool((mask[:, :known].bool() == real).all() & mask[:, known:].all())

    def ready(self, ids: torch.Tensor) -> bool:
        """Whether a step of these rows is captured."""
        captured = self._replay is not None and self._ids is not None and self._ids.shape == ids.shape
        return captured and all(steps.current for steps in self.steps)

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, ids: torch.Tensor, positions: torch.Tensor | None) -> Any:
        """The model's output after one token of every row, ids [batch, 1], by a replay."""
        cache = self.cache
        if positions is None:
            positions = torch.full(ids.shape, cache.layers[0].seen, dtype=torch.int64, device=ids.device)
        if not self.ready(ids):
            self._prepare(ids, positions)
        assert self._ids is not None
        assert self._positions is not None
        assert self._replay is not None
        for steps in self.steps:
            steps.prepare()
        self._ids.copy_(ids)
        self._positions.copy_(positions)
        self._replay()
        for layer, steps in zip(cache.layers, self.steps, strict=True):
            steps.advance()
            layer.record(1, None)
        self.replays += 1
        out = {name: cache if value is _CACHE else value for name, value in self._out.items()}
        return self._kind(**{**out, "logits": out["logits"].clone()})

    def forget(self) -> None:
        """Drops the captured graph and the pages that were taken ahead for it."""
        for steps in self.steps:
            steps.close()
        self.steps, self._replay, self._out, self._real = [], None, None, None

    def _prepare(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        layers = self.cache.layers
        self.forget()
        self._ids, self._positions = ids.clone(), positions.expand(ids.shape).clone()
        for i, layer in enumerate(layers):
            layer.cache.make_room(1)  # a run whose lengths are put back must not move tokens
            # Layers take turns at coding pages, so that no step codes those of all layers.
            lead = 1 + i * most_lead(layer.cache.codec.spec.window) // len(layers)
            self.steps.append(StaticSteps(layer.cache, self.max_length, lead))
        for steps in self.steps:
            steps.prepare()
        try:
            self._replay = self._record()
        finally:
            self._rewind()
        log.info("decode step of %d rows captured for up to %d tokens", ids.shape[0], self.steps[0].max_tokens)

    def _run(self) -> None:
        cache = self.cache
        for layer, steps in zip(cache.layers, self.steps, strict=True):
            layer.steps = steps
        try:
            out = self.forward(
                input_ids=self._ids,
                position_ids=self._positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        finally:
            for layer in cache.layers:
                layer.steps = None
        more = [name for name, value in out.items() if name != "logits" and value is not cache]
        if more:  # they would lie in memory that the next replay writes
            raise NotLogitsAlone(f"[decode_graph] expected a model that gives logits alone; got {', '.join(more)}")
        # Kept without the cache, which would else never be given up.
        self._kind = type(out)
        self._out = {name: _CACHE if value is cache else value for name, value in out.items()}

    def _rewind(self) -> None:
        for steps in self.steps:
            steps.rewind()

    def _record(self) -> Callable[[], None]:
        """Captures `_run`, after running it once: what is allocated at first use must not lie in the graph's memory."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self._rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._run()
        return graph.replay


class DecodeGraph(StepGraph):
    """While entered, the model's decode steps over one cache are replays of a CUDA graph.

    Args:
        model: on a CUDA device, run with attn_implementation="forge".
        cache: all of whose layers are packed, without sparse, eviction or sharding.
        max_length: most tokens of a row.

    Attributes:
        replays: steps that were replayed.
        eager: calls of the model that were not.

    Raises:
        ValueError: a model on another device, or a cache with layers that a graph cannot hold.
    """

    def __init__(self, model: Any, cache: ForgeCache, max_length: int) -> None:
        super().__init__(model, cache, max_length, own_forward(model))
        self._model, self._kept = model, cache
        self._outer = vars(model).get("forward")
        self.eager = 0

    def __enter__(self) -> DecodeGraph:
        @functools.wraps(self.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._call(args, kwargs)

        self._model.forward = forward
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._outer is None:
            del self._model.forward
        else:
            self._model.forward = self._outer
        self.forget()

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = self.arguments(args, kwargs)
        if not self.serves(given):
            self.eager += 1
            return self.forward(*args, **kwargs)
        return self.step(given["input_ids"], given.get("position_ids"))


def own_forward(model: Any) -> Callable[..., Any]:
    """The model's forward, without what caches put before it to replay graphs by themselves."""
    return getattr(model.forward, "without_graphs", model.forward)


def refusal(cache: ForgeCache) -> str | None:
    """Why the steps over a cache cannot be held by a graph, in words; None if they can."""
    stock = [i for i, layer in enumerate(cache.layers) if not isinstance(layer, PackedLayer)]
    if stock:
        return f"packed layers only; got stock caches in layers {stock}"
    given = [name for name in ("eviction", "sharding") if getattr(cache, name) is not None]
    given += ["sparse"] if any(layer.sparse is not None for layer in cache.layers) else []
    if given:
        return f"a cache that keeps and reads all pages; got one with {' and '.join(given)}"
    if not most_lead(cache.spec.window):
        return "a codec with a window; got window 0"
    return None
