"""mlx-lm: packed prompt caches for its generation, batching, speculative decoding and server.

    from forgeattention.integrations.mlx import make_prompt_cache, patched

    with patched():
        mlx_lm.generate(model, tokenizer, prompt, prompt_cache=make_prompt_cache(model))

mlx-lm has no place where a cache could bring its own attention, and models import `scaled_dot_product_attention` by
name. `patched` replaces that name wherever it was imported, and puts everything back.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import base
from mlx_lm.models import cache as stock

from ...cache import PendingTokens
from ...cache.report import packed_entry, stock_entry, totals
from ...codec import Codec, CodecSpec
from ...codec.presets import spec_of
from ...codec.spec import FORMAT_VERSION
from ...eviction import Centres, Eviction, rope_of
from ...models.fingerprint import mlx_fingerprint
from ...models.weights.mlx import LayerAttention, weight_codecs
from ...sparse import SparseLayer, SparseSpec
from ...util.files import replaced
from .cache import Codecs, PackedKVCache, Seam
from .convert import packed_width, readable, widened
from .probe import ProbedStates, probe
from .recurrent import SnapshotCache, trim_prompt_cache

__all__ = [
    "PackedKVCache",
    "load_prompt_cache",
    "make_prompt_cache",
    "patched",
    "report",
    "save_prompt_cache",
    "trim_prompt_cache",
]

_lock = threading.RLock()
log = logging.getLogger("forgeattention")


class NothingToPack(ValueError):
    """A model without a full-attention layer."""


def make_prompt_cache(
    model: Any,
    spec: CodecSpec | str | None = None,
    *,
    codecs: Mapping[int, Codec] | None = None,
    fitted: bool = True,
    max_pages: int | None = None,
    snapshots: int = 0,
    backend: str = "auto",
    eviction: Eviction | None = None,
    sparse: SparseSpec | None = None,
) -> list[Any]:
    """A prompt cache whose full-attention layers are packed.

    Rotating (sliding-window), recurrent and linear-attention layers keep what mlx-lm gives them, and so do layers with
    two key caches. `trim_prompt_cache` works on it where those layers can go back, and else raises. What each layer
    needs is asked of the model by one pass that evaluates nothing: a model that cannot be served is refused here.

    Args:
        model: mlx-lm's model.
        spec: how the cache is coded: a spec, or the name of one of `PRESETS`.
        codecs: codecs of single layers, for what a spec cannot say (custom matrices, centres).
        fitted: fit the other layers' codecs to the model's weights where these are found (`models.weights`).
        max_pages: most pages of one layer, or None.
        snapshots: states that each recurrent layer remembers, of prompts' ends and of single steps, so that
            `trim_prompt_cache` can go back to them.
        backend: which kernels run, "auto" or a name of `ops`.
        eviction: how packed layers give up pages; None keeps all.
        sparse: which packed tokens decode steps read; None for all. Not with budgets, nor on MLX's CUDA backend.

    Raises:
        ValueError: a model that computes with its keys itself, a codec for a layer that is not packed, no layer that
            could be, or eviction from a model whose rotation is not known.
    """
    if sparse is not None and sparse.budgets is not None:
        raise ValueError("[mlx_lm] expected top_k or top_p; got budgets, which are measured on transformers' models")
    spec = spec_of(spec)
    made, layers = _stock_prompt_cache(model), full_attention(model)
    own, given = dict(codecs or {}), set(codecs or {})
    if not layers or not given <= layers.keys():
        what = f"full-attention layers, {sorted(given)} among them" if given else "a full-attention layer"
        raise NothingToPack(f"[mlx_lm] expected {what}; got {sorted(layers)} of {len(made)}")
    if fitted:
        own = weight_codecs(model, spec, layers) | own
    if sparse is not None:
        sparse.warn_of_min_context()
    shared: Codecs = {}
    rope = rope_of(model.args) if eviction is not None and eviction.policy.scored else None
    fraction = len(layers) / len(made)

    def swap(i: int, layer: Any) -> Any:
        if type(layer) is stock.KVCache and i in layers:
            evicting = None if eviction is None else {"settings": eviction, "rope": rope, "fraction": fraction,
                                                      "centres": _centres(eviction, i)}  # fmt: skip
            return PackedKVCache(
                spec, codec=own.get(i), codecs=shared, max_pages=max_pages, backend=backend, evicting=evicting,
                sparse=None if sparse is None else SparseLayer(sparse),
            )  # fmt: skip
        if type(layer) is stock.ArraysCache and snapshots:
            return SnapshotCache(len(layer.cache), snapshots=snapshots)
        return stock.CacheList(*(swap(i, x) for x in layer.caches)) if _packs(layer) else layer

    return [swap(i, layer) for i, layer in enumerate(made)]


def full_attention(model: Any) -> dict[int, LayerAttention]:
    """The layers of a model that can be packed, by their number in its prompt cache.

    Raises:
        ValueError: the model computes with its keys itself, or its heads are too wide.
    """
    with patched():
        found = {i: layer for (i, _), layer in probe(model, _stock_prompt_cache, _packs).items()}
    for layer in found.values():
        packed_width(layer.k_dim, layer.v_dim)
    return found


def _centres(eviction: Eviction, layer: int) -> Centres | None:
    return None if eviction.centres is None else eviction.centres[layer].copy()


def _packs(layer: Any) -> bool:
    """Whether a layer of mlx-lm's has a cache of keys and values that can be packed."""
    if type(layer) is not stock.CacheList:
        return type(layer) is stock.KVCache
    kinds = [type(x) for x in layer.caches]
    # Attention beside a recurrent state. Two caches of keys are latents and their index.
    return kinds.count(stock.KVCache) == 1 and set(kinds) <= {stock.KVCache, stock.ArraysCache}


# The function itself, since `patched` replaces the name.
_stock_prompt_cache: Callable[..., list[Any]] = stock.make_prompt_cache


@contextmanager
def patched(spec: CodecSpec | None = None, **options: Any) -> Iterator[None]:
    """Within it, mlx-lm's attention reads packed caches, its load_prompt_cache knows them, and its trim_prompt_cache
    raises where it could not trim one with packed layers.

    It holds for the whole process, other threads included, and may be nested.

    Args:
        spec: if given, mlx-lm itself makes packed caches too, wherever it makes one and none was passed: in generate,
            batch_generate, the server, for draft models.
        options: as for `make_prompt_cache`; only with a spec.
    """
    if options and spec is None:
        raise ValueError(f"[mlx_lm] expected a spec with options; got {sorted(options)} alone")
    with _lock:
        names: list[tuple[str, Any, Any]] = []
        attention = base.scaled_dot_product_attention
        if not Seam.depth:
            for step in (generate_step, speculative_generate_step):
                names.append((step.__name__, step, _without_other_caches(step)))
            names.append(("scaled_dot_product_attention", attention, _with_packed(attention)))
            names.append(("trim_prompt_cache", stock.trim_prompt_cache, _loud(stock.trim_prompt_cache)))
        if spec is not None:
            names.append(("make_prompt_cache", stock.make_prompt_cache, _making(spec, options)))
        for name, old, new in names:
            _rename(name, old, new)
        Seam.depth += 1
        Seam.making += spec is not None
        stock.PackedKVCache, stock.SnapshotCache = PackedKVCache, SnapshotCache
    try:
        yield
    finally:
        with _lock:
            Seam.depth -= 1
            Seam.making -= spec is not None
            for name, old, new in reversed(names):
                _rename(name, new, old)
            if not Seam.depth:
                del stock.PackedKVCache, stock.SnapshotCache


def _rename(name: str, old: Any, new: Any) -> None:
    """Makes `name` mean `new` in every module where it means `old`; modules may have been imported meanwhile."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


def _attend(keys: Any, queries: Any, mask: Any, scale: float, sinks: Any) -> Any:
    """Attention to packed keys by queries that may be narrower, and of another dtype."""
    if isinstance(keys, ProbedStates):
        return keys.attend(queries, mask, scale, sinks)
    q = widened(queries.astype(keys.k.dtype), keys.k.shape[3])
    logits = None if sinks is None else sinks.astype(mx.float32)
    out = keys.attend(q, mask, scale, logits)[..., : keys.layer.v_dim]
    return out.astype(queries.dtype)


def _with_packed(attention: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(attention)
    def scaled_dot_product_attention(
        queries: Any, keys: Any, values: Any, cache: Any, scale: float, mask: Any = None, sinks: Any = None
    ) -> Any:
        if isinstance(keys, PendingTokens | ProbedStates):
            return _attend(keys, queries, mask, scale, sinks)
        return attention(queries, keys, values, cache, scale, mask, sinks)

    return scaled_dot_product_attention


def _loud(trim: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(trim)
    def trim_stock_or_packed(cache: Sequence[Any], num_tokens: int) -> int:
        return trim_prompt_cache(cache, num_tokens) if _any_packed(cache) else trim(cache, num_tokens)

    return trim_stock_or_packed


def _any_packed(cache: Sequence[Any]) -> bool:
    parts = (part for layer in cache for part in getattr(layer, "caches", [layer]))
    return any(isinstance(part, PackedKVCache) for part in parts)


def _without_other_caches(step: Callable[..., Any]) -> Callable[..., Any]:
    """mlx-lm's generation, which passes over packed layers when it is asked for a quantised or a bounded cache."""

    @functools.wraps(step)
    def checked(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("prompt_cache")
        if Seam.making if cache is None else _any_packed(cache):
            for name in ("kv_bits", "max_kv_size"):
                if kwargs.get(name) is not None:
                    raise ValueError(f"[mlx_lm] expected no {name} with a packed cache; got {kwargs[name]}")
        return step(*args, **kwargs)

    return checked


def _making(spec: CodecSpec, options: Mapping[str, Any]) -> Callable[..., list[Any]]:
    @functools.wraps(_stock_prompt_cache)
    def make(model: Any, max_kv_size: int | None = None) -> list[Any]:
        if max_kv_size is not None:
            raise ValueError(f"[mlx_lm] expected no max_kv_size with a packed cache; got {max_kv_size}")
        try:
            return make_prompt_cache(model, spec, **options)
        except NothingToPack as error:
            log.warning("mlx-lm's own caches serve this model: %s", error)
            return _stock_prompt_cache(model)

    return make


def report(cache: Sequence[Any]) -> dict[str, Any]:
    """What is packed, per layer and in all (`cache.report` says what it holds). A layer with two caches has two
    entries."""
    entries: list[dict[str, Any]] = []
    for i, layer in enumerate(cache):
        for part in layer.caches if isinstance(layer, stock.CacheList) else [layer]:
            if isinstance(part, PackedKVCache):
                entries.append(packed_entry(i, part.cache, part.codec, part.size()))
            else:
                entries.append(stock_entry(i, type(part).__name__, part.size(), part.nbytes))
    return totals(entries, len(cache))


def save_prompt_cache(path: str | os.PathLike[str], cache: Sequence[Any], model: Any) -> None:
    """Writes a prompt cache to a .safetensors file, which is replaced only once the new one is complete.

    mlx-lm's own save_prompt_cache works too, under `patched`, but knows neither model nor damage.

    Raises:
        ValueError: a packed layer with a codec that follows neither from its spec nor from the model's weights.
    """
    # A copy leaves behind the pages of other sequences that share the memory.
    alone = [layer.extract(0) if isinstance(layer, PackedKVCache) else layer for layer in cache]
    for i, layer in enumerate(alone):
        codec = layer.codec if isinstance(layer, PackedKVCache) else None
        if codec is not None and readable(layer.spec, codec).fingerprint != codec.fingerprint:
            raise ValueError(f"[mlx_lm] expected codecs of a spec and the model's weights; got another in layer {i}")
    metadata = {
        "forgeattention": str(FORMAT_VERSION),
        "model": mlx_fingerprint(model),
        "sha256": _checksum([layer.state for layer in alone]),
    }
    with replaced(path, suffix=".safetensors", mode=0o600) as temporary:  # it holds somebody's prompt
        stock.save_prompt_cache(temporary, alone, metadata)


def load_prompt_cache(path: str | os.PathLike[str], model: Any) -> list[Any]:
    """Reads what `save_prompt_cache` wrote.

    Raises:
        ValueError: a damaged file, one of another format version or another model.
    """
    with patched():
        try:
            cache, metadata = stock.load_prompt_cache(os.fspath(path), return_metadata=True)
        except (RuntimeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"[mlx_lm] expected a complete prompt cache; got {path}: {error}") from None
    for name, want, got in (
        ("format version", str(FORMAT_VERSION), metadata.get("forgeattention")),
        ("model", mlx_fingerprint(model), metadata.get("model")),
        ("checksum", metadata.get("sha256"), _checksum([layer.state for layer in cache])),
    ):
        if want != got:
            raise ValueError(f"[mlx_lm] expected {name} {want!r}; got {got!r} in {path}")
    layers = full_attention(model)
    for i, layer in enumerate(cache):
        for part in layer.caches if isinstance(layer, stock.CacheList) else [layer]:
            if isinstance(part, PackedKVCache) and i in (codecs := weight_codecs(model, part.spec, layers)):
                part.adopt(codecs[i])
    return cache


def _checksum(states: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for name, value in tree_flatten(list(states)):
        if isinstance(value, mx.array):
            digest.update(f"{name} {value.dtype} {value.shape}".encode())
            digest.update(np.array(value.reshape(-1).view(mx.uint8), copy=False).data if value.size else b"")
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()
