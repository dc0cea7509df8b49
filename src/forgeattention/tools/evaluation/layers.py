"""Which layer a cache harms: the error of every attention block's output, given the exact run's own inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .streaming import attention, spans, step


@dataclass(frozen=True)
class LayerError:
    """Relative error of one layer's attention output: the norm of the difference over the norm of the exact output,
    root mean square over positions, channels and texts."""

    layer: int
    error: float


@torch.no_grad()
def attention_errors(
    model: Any,
    ids: torch.Tensor,
    make_cache: Callable[[], Any],
    *,
    block: int = 128,
    start: int | None = None,
    implementation: str | None = None,
) -> list[LayerError]:
    """Read texts with the exact cache; feed every attention block's inputs to the same block with another cache.

    An error of a layer below does not reach the layers above, so the figures are the layers' own.

    Args:
        model: a transformers causal language model.
        ids: int64, [texts, tokens]; each text is read alone, with new caches.
        make_cache: makes an empty candidate cache.
        block: tokens that are read at once.
        start: first position measured; half of the text if None.
        implementation: transformers attention implementation for the candidate; None leaves the model's.

    Raises:
        ValueError: no measured position, or a model whose attention blocks are not found.
    """
    from transformers import DynamicCache

    if ids.ndim != 2 or ids.shape[0] < 1:
        raise ValueError(f"[layers] expected ids of shape [texts, tokens]; got {list(ids.shape)}")
    start = ids.shape[1] // 2 if start is None else start
    if not 0 <= start < ids.shape[1]:
        raise ValueError(f"[layers] expected 0 <= start < {ids.shape[1]}; got {start}")
    blocks = _attention_blocks(model)
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}
    error, norm = dict.fromkeys(blocks, 0.0), dict.fromkeys(blocks, 0.0)
    exact, skip = True, 0

    def before(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if exact:
                inputs[layer] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                return None
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": inputs[layer]}
            return (inputs[layer], *args[1:]), kwargs

        return hook

    def after(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...], result: Any) -> None:
            out = (result[0] if isinstance(result, tuple) else result).double()
            if exact:
                outputs[layer] = out
            else:
                error[layer] += float((out - outputs[layer])[:, skip:].square().sum())
                norm[layer] += float(outputs[layer][:, skip:].square().sum())

        return hook

    handles = []
    for layer, module in blocks.items():
        handles.append(module.register_forward_pre_hook(before(layer), with_kwargs=True))
        handles.append(module.register_forward_hook(after(layer)))
    try:
        for text in ids.to(model.device):
            reference, candidate = DynamicCache(config=model.config), make_cache()
            for first, last in spans(ids.shape[1], block):
                piece, skip = text[None, first:last], max(start - first, 0)
                exact = True
                step(model, piece, reference, keep=1)
                exact = False
                with attention(model, implementation):
                    step(model, piece, candidate, keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return [LayerError(layer, math.sqrt(error[layer] / norm[layer]) if norm[layer] else 0.0) for layer in blocks]


def _attention_blocks(model: Any) -> dict[int, Any]:
    """The attention modules of the decoder by layer number."""
    found = {
        module.layer_idx: module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "o_proj")
    }
    if not found:
        raise ValueError(f"[layers] expected attention blocks with layer_idx and o_proj; got {type(model).__name__}")
    return dict(sorted(found.items()))
