"""Which models the attention implementation "forge" serves, read from transformers' classes and configs."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

_served: set[type] = set()


def model_classes(config: Any, model: torch.nn.Module | None = None) -> list[type]:
    """The transformers classes of the decoder that a config describes.

    Args:
        config: the decoder's own config (of a model with images, its text config).
        model: the model, whose own classes then count; else all classes that are loaded for this kind of config.
    """
    from transformers import PreTrainedModel

    kind = type(config)
    if model is not None:
        own = {type(m) for m in model.modules() if isinstance(m, PreTrainedModel) and type(m.config) is kind}
        if own:
            return sorted(own, key=lambda c: c.__name__)
    found: list[type] = []
    waiting: list[type] = [PreTrainedModel]
    while waiting:
        here = waiting.pop()
        waiting += here.__subclasses__()
        if getattr(here, "config_class", None) is kind:
            found.append(here)
    return sorted(found, key=lambda c: c.__name__)


def unserved(config: Any, model: torch.nn.Module | None = None) -> str | None:
    """Why "forge" cannot compute the attention of a model; None where it can.

    transformers asks the same of a class before it takes "sdpa" or flash attention for it: the class must call the
    attention function that is registered by name, and that function must be all of its attention (a class that runs
    neither with "sdpa" nor with flash attention adds terms of its own to masks that only its eager code reads).

    Args:
        config: the decoder's own config.
        model: the model, if there is one.
    """
    if type(config) in _served:
        return None
    classes: list[Any] = model_classes(config, model)
    if not classes:
        return None  # nothing is known; what the layers do is checked when they run
    if not any(c._can_set_attn_implementation() for c in classes):
        return f"got {classes[0].__name__}, which computes attention in its own code"
    if not any(c._supports_sdpa or c._supports_flash_attn for c in classes):
        return f"got {classes[0].__name__}, whose attention only its own eager code computes"
    if model is None:
        _served.add(type(config))
    return None


def load_classes(config: Any) -> None:
    """Imports the classes of a config of transformers, so that `unserved` can tell of them."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    if name.startswith("transformers.models.") and importlib.util.find_spec(name) is not None:
        importlib.import_module(name)
