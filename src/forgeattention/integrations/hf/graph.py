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
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from ...cache.steps import StaticSteps, most_lead
from .cache import ForgeCache
from .layer import PackedLayer

log = logging.getLogger("forgeattention")

_READ = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
_IGNORED = {"return_dict", "cache_position"}


class DecodeGraph:
    """While entered, the model's decode steps over one cache are replays of a CUDA graph.

    Args:
        model: on a CUDA device, run with attn_implementation="forge".
        cache: all of whose layers are packed.
        max_length: most tokens of a row.

    Attributes:
        replays: steps that were replayed.
        eager: calls of the model that were not.

    Raises:
        ValueError: a model on another device, or layers with a stock cache.
    """

    def __init__(self, model: Any, cache: ForgeCache, max_length: int) -> None:
        self._check_device(model)
        stock = [i for i, layer in enumerate(cache.layers) if not isinstance(layer, PackedLayer)]
        if stock:
            raise ValueError(f"[decode_graph] expected packed layers only; got stock caches in layers {stock}")
        self._model, self._cache, self._max_length = model, cache, max_length
        self._forward: Callable[..., Any] = model.forward
        self._signature = inspect.signature(self._forward)
        kinds = {p.kind: name for name, p in self._signature.parameters.items()}
        self._more = kinds.get(inspect.Parameter.VAR_KEYWORD, "")
        self._steps: list[StaticSteps] = []
        self._replay: Callable[[], None] | None = None
        self._ids: torch.Tensor | None = None
        self._positions: torch.Tensor | None = None
        self._out: Any = None
        self.replays = 0
        self.eager = 0

    def _check_device(self, model: Any) -> None:
        if model.device.type != "cuda":
            raise ValueError(f"[decode_graph] expected a model on a CUDA device; got {model.device}")

    def __enter__(self) -> DecodeGraph:
        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._call(args, kwargs)

        self._model.forward = forward
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._model.forward
        self._replay, self._out = None, None

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = self._signature.bind(*args, **kwargs).arguments
        given |= given.pop(self._more, {})
        if not self._is_step(given):
            self.eager += 1
            return self._forward(*args, **kwargs)
        with torch.no_grad():
            return self._step(given["input_ids"], given.get("position_ids"))

    def _is_step(self, given: dict[str, Any]) -> bool:
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if given.get("past_key_values") is not self._cache or ids is None or ids.shape[1] != 1:
            return False
        if any(layer.cache is None or layer.cache.batch != ids.shape[0] for layer in self._cache.layers):
            return False
        others = [value for name, value in given.items() if name not in _READ | _IGNORED]
        if any(value is not None and value is not False for value in others) or given.get("return_dict") is False:
            return False
        keep = given.get("logits_to_keep", 0)
        if given.get("use_cache") is False or not isinstance(keep, int) or keep not in (0, 1):
            return False
        # Reading the mask waits for the device, as generate does after every step anyway.
        return mask is None or (mask.ndim == 2 and bool(mask[:, -1].all()))

    def _step(self, ids: torch.Tensor, positions: torch.Tensor | None) -> Any:
        if positions is None:
            positions = torch.full(ids.shape, self._cache.layers[0].seen, dtype=torch.int64, device=ids.device)
        stale = self._replay is None or self._ids is None or self._ids.shape != ids.shape
        if stale or not all(steps.current for steps in self._steps):
            self._prepare(ids, positions)
        assert self._ids is not None
        assert self._positions is not None
        assert self._replay is not None
        for steps in self._steps:
            steps.prepare()
        self._ids.copy_(ids)
        self._positions.copy_(positions)
        self._replay()
        for layer, steps in zip(self._cache.layers, self._steps, strict=True):
            steps.advance()
            layer.record(1, None)
        self.replays += 1
        return type(self._out)(**{**self._out, "logits": self._out.logits.clone()})

    def _prepare(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        cache = self._cache
        self._replay, self._out = None, None
        self._ids, self._positions = ids.clone(), positions.expand(ids.shape).clone()
        for steps in self._steps:
            steps.close()
        self._steps = []
        for i, layer in enumerate(cache.layers):
            layer.cache.make_room(1)  # a run whose lengths are put back must not move tokens
            # Layers take turns at coding pages, so that no step codes those of all layers.
            lead = 1 + i * most_lead(layer.cache.codec.spec.window) // len(cache.layers)
            self._steps.append(StaticSteps(layer.cache, self._max_length, lead))
        for steps in self._steps:
            steps.prepare()
        try:
            self._replay = self._record()
        finally:
            self._rewind()
        log.info("decode step of %d rows captured for up to %d tokens", ids.shape[0], self._steps[0].max_tokens)

    def _run(self) -> None:
        for layer, steps in zip(self._cache.layers, self._steps, strict=True):
            layer.steps = steps
        try:
            self._out = self._forward(
                input_ids=self._ids,
                position_ids=self._positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        finally:
            for layer in self._cache.layers:
                layer.steps = None

    def _rewind(self) -> None:
        for steps in self._steps:
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
