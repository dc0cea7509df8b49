"""Which models the attention implementation "forge" serves, read from transformers' classes and configs."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..codec.spec import stored_head_dim

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


def layers_that_share(config: Any, own: int) -> set[int]:
    """Which of the `own` layers with keys of their own are read by later layers too."""
    if (modes := getattr(config, "kv_sharing_modes", None)) is not None:
        return {i for i, mode in enumerate(modes) if mode == "store"}
    if not getattr(config, "num_kv_shared_layers", 0):  # where transformers does not name the modes yet
        return set()
    return set({kind: i for i, kind in enumerate(config.layer_types[:own])}.values())


HANDLES = frozenset({"to"})
"""Attributes that a packed layer's handle has in place of keys and values."""


def attention_modules(model: torch.nn.Module) -> dict[int, list[torch.nn.Module]]:
    """The modules that put keys and values into each layer of a cache, by layer number."""
    found: dict[int, list[torch.nn.Module]] = {}
    for module in model.modules():
        number: Any = getattr(module, "layer_idx", getattr(module, "layer_id", None))
        kind: Any = type(module)
        if isinstance(number, int) and _updates(kind) is not None:
            found.setdefault(number, []).append(module)
    return found


def unpackable(config: Any) -> str | None:
    """What packed layers expect of a model and it does not give, as "... ; got ..."; None where all is well.

    Args:
        config: the decoder's own config.
    """
    from transformers.cache_utils import DynamicCache

    module = _modelling(config)
    if module is None:
        return None
    name = type(config).__name__
    for value in list(vars(module).values()):
        if isinstance(value, type) and issubclass(value, DynamicCache) and value.__module__ == module.__name__:
            return f"a model that takes any cache of transformers; got {name}, which takes a {value.__name__}"
    # Mllama looks at the keys of its cross-attention layers, to see whether there are images; those are not packed.
    if "layer.keys" in _text(module) and not hasattr(config, "cross_attention_layers"):
        return f"a model that leaves keys to its attention; got {name}, which reads them from the cache"
    return None


def decoded(config: Any, model: torch.nn.Module | None, layers: Sequence[int], unserved: str | None) -> dict[int, str]:
    """The layers whose attention no kernel computes, which must be given decoded keys and values, and why.

    Args:
        config: the decoder's own config.
        model: the model; without it, what all attention classes of the config's modelling file have in common.
        layers: numbers of the layers to be packed.
        unserved: what `unserved` says.

    Raises:
        ValueError: a model that takes no cache, or whose layers never read one.
    """
    found: dict[int, str] = {}
    if model is not None:
        modules = attention_modules(model)
        for i in layers:
            each = (unserved or _unpackable(type(m), m, config) for m in modules.get(i, ()))
            if (reason := next((r for r in each if r is not None), None)) is not None:
                found[i] = reason
    else:
        module = _modelling(config)
        kinds = [] if module is None else [x for x in list(vars(module).values()) if isinstance(x, type)]
        own = [kind for kind in kinds if kind.__module__ == module.__name__ and _updates(kind) is not None]
        reasons = [unserved or _unpackable(kind, None, config) for kind in own]
        if reasons and (first := reasons[0]) is not None and None not in reasons:
            found = dict.fromkeys(layers, first)
    if unserved is not None:
        takes = any("past_key_values" in _parameters(kind) for kind in model_classes(config, model))
        if not takes or (layers and not found):
            raise ValueError(f"[forge_cache] expected a model that reads its keys from a cache; {unserved}")
    return found


@functools.cache
def _parameters(kind: type) -> frozenset[str]:
    """Names of what a class's forward takes."""
    return frozenset(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]


def _modelling(config: Any) -> Any:
    return sys.modules.get(type(config).__module__.replace(".configuration_", ".modeling_"))


@functools.cache
def _text(module: Any) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return ""


def _unpackable(kind: type, module: torch.nn.Module | None, config: Any) -> str | None:
    name = kind.__name__
    for what, guard in _updates(kind) or ():
        if guard is None or getattr(module, guard, None) is not None:
            return f"got {name}, which reads their {what}"
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap and "softcap" in _source(kind):
        return f"got {name}, which caps its scores at {cap:g}"
    dims = _head_dims(module)
    if dims is not None:
        try:
            stored_head_dim(*dims)
        except ValueError as error:
            return f"{str(error).partition('; ')[2]} in {name}"
    return None


def _head_dims(module: Any) -> tuple[int, int] | None:
    """Channels of a head of keys and of values, where an attention module names them."""
    k_dim = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None)
    v_dim = getattr(module, "v_head_dim", None) or k_dim
    return (k_dim, v_dim) if isinstance(k_dim, int) and isinstance(v_dim, int) else None


@functools.cache
def _source(kind: type) -> str:
    try:
        return textwrap.dedent(inspect.getsource(kind.forward))  # type: ignore[attr-defined]
    except (AttributeError, OSError, TypeError):
        return ""


@functools.cache
def _updates(kind: type) -> tuple[tuple[str, str | None], ...] | None:
    """What a class's forward reads of the keys and values that a cache's `update` gave it; None if it updates no cache.

    Returns:
        what is read, and the attribute of the module that must not be None for it to be read, if there is one.
    """
    source = _source(kind)
    if ".update(" not in source:
        return None
    tree = ast.parse(source)
    given: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and _calls_update(node.value):
            names = [x.id for target in node.targets for x in ast.walk(target) if isinstance(x, ast.Name)]
            given |= dict.fromkeys(names, node.lineno)
    return tuple(_reads(tree, given, None)) if given else None


def _reads(tree: ast.AST, given: Mapping[str, int], guard: str | None) -> Iterator[tuple[str, str | None]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Attribute) and _is_given(node.value, given) and node.attr not in HANDLES:
            yield f".{node.attr}", guard
        if isinstance(node, ast.Subscript) and _is_given(node.value, given):
            yield "elements", guard
        if isinstance(node, ast.Call) and any(_is_given(x, given) for x in node.args):
            called = ast.unparse(node.func)
            # Methods of the module with a leading underscore are attention functions of their own (GPT-2's).
            if called.startswith(("torch.", "nn.", "F.")) or re.match(r"self\.[a-z]", called):
                yield f"values by {called}", guard
        inner = guard
        if isinstance(node, ast.If) and (own := re.fullmatch(r"self\.(\w+) is not None", ast.unparse(node.test))):
            inner = own[1]
        yield from _reads(node, given, inner)


def _is_given(node: ast.AST, given: Mapping[str, int]) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.lineno > given.get(node.id, 1 << 30)


def _calls_update(node: ast.AST) -> bool:
    if isinstance(node, ast.Subscript):
        node = node.value
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update"
