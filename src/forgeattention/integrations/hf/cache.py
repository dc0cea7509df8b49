"""Hugging Face transformers: a packed `Cache` for the attention implementation "forge" (`.attention`).

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="forge")
    model.generate(**inputs, past_key_values=ForgeCache(model))

Importing this package registers the name "forge" with transformers' two interfaces and changes nothing else. A packed
layer's `update` gives a handle instead of keys and values; the attention function, which knows the padding, appends
to the cache and attends. Where a model's attention is its own code, a layer gives decoded keys and values (`.decoded`).
"""

from __future__ import annotations

import copy
import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer

from ... import cache as storage
from ...cache import TorchArrays
from ...cache.layer import check_strategies
from ...cache.report import packed_entry, stock_entry, totals
from ...cache.strategies import PageSharding
from ...codec import Codec, CodecSpec
from ...codec.presets import spec_of
from ...eviction import Eviction, Evictor, attention_fraction, rope_of
from ...models.fingerprint import fingerprint
from ...models.support import decoded, layers_that_share, load_classes, unpackable, unserved
from ...models.weights.hf import weight_codecs
from ...sparse import Budgets, SparseLayer, SparseSpec, sparse_means
from . import attention as hf_attention
from .auto_graph import attach, unfit
from .decoded import DecodedLayer, Scratch
from .layer import CodedLayer, Keep, PackedLayer

log = logging.getLogger("forgeattention")


def _stock_layers(config: Any) -> list[Any]:
    """The layers of the cache that transformers makes for a model.

    Raises:
        ValueError: a model that has a cache of its own.
    """
    try:
        return list(DynamicCache(config=config).layers)
    except (AttributeError, KeyError, TypeError) as error:
        name = type(config).__name__
        raise ValueError(f"[forge_cache] expected a model that a DynamicCache serves; got {name}: {error}") from error


class ForgeCache(Cache):
    """A cache for `past_key_values` whose full-attention layers are packed.

    Sliding-window, linear-attention and hybrid layers keep the stock cache; `report` says which. The model must run
    with attn_implementation="forge". For inference: no gradient flows through it.

    Layers whose attention no kernel computes are read by decoding: their pages are as small, but every step decodes
    them whole, one layer at a time (docs/families.md says for which models and what it costs). A log line names them.

    Args:
        model: the model, whose weights then fit the codecs of the keys (`models.weights`), or its config alone.
        spec: how the cache is coded: a spec, or the name of one of `PRESETS`.
        codecs: codecs of single layers, for what a spec cannot say (custom matrices, centres).
        exact_layers: layers to leave to the stock cache.
        max_pages: most pages of one layer, or None.
        backend: which kernels run, "auto" or a name of `ops`.
        sparse: which packed tokens decode steps read; None for all. Prompts are always read densely.
        sparse_log: list to which every sparse step of a layer adds its statistics; then every step waits for the
            device.
        eviction: how packed layers give up pages; None keeps all.
        sharding: the part of one very long row that this process keeps (`cache.sharded.Sharding`); None for all of
            it. Not with sparse or eviction.
        graph: whether decode steps replay a CUDA graph by themselves once several came in a row (`.auto_graph`): where
            it can be (None), always (True: an error where it cannot), or never. Needs the model itself, on one CUDA
            device and without adapters, and packed layers alone that keep and read all pages. Copies run without.

    Raises:
        ValueError: a layer number that is not in the model, eviction from a model whose rotation is not known, or
            options that do not go together, or a model whose layers cannot be packed.
    """

    layers: list[Any]

    def __init__(
        self,
        model: Any,
        spec: CodecSpec | str | None = None,
        *,
        codecs: Mapping[int, Codec] | None = None,
        exact_layers: Iterable[int] = (),
        max_pages: int | None = None,
        backend: str = "auto",
        sparse: SparseSpec | None = None,
        sparse_log: list[dict[str, float]] | None = None,
        eviction: Eviction | None = None,
        sharding: PageSharding | None = None,
        graph: bool | None = None,
    ) -> None:
        check_strategies(sparse=sparse, eviction=eviction, sharding=sharding)
        self.sharding = sharding
        self.spec = spec_of(spec)
        self.max_pages = max_pages
        self.backend = backend
        config: Any = model.config if isinstance(model, torch.nn.Module) else model
        text = config.get_text_config(decoder=True)
        layers = _stock_layers(config)
        whole = model if isinstance(model, torch.nn.Module) else None
        load_classes(text)
        attends = any(type(layer) is not LinearAttentionLayer for layer in layers)
        reason = unserved(text, whole) if attends else None
        if reason is not None and getattr(text, "_attn_implementation", None) == "forge":
            raise ValueError(
                f"[forge_cache] expected a model whose attention can be exchanged; {reason}: load it without "
                "attn_implementation='forge', then its layers are read by decoding"
            )
        own, exact = dict(codecs or {}), set(exact_layers)
        if not exact | set(own) <= set(range(len(layers))):
            raise ValueError(f"[forge_cache] expected layers in [0, {len(layers)}); got {sorted(exact | set(own))}")
        stock = exact.union(getattr(text, "cross_attention_layers", None) or ())
        packed = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer and i not in stock]
        if packed and (refusal := unpackable(text)) is not None:
            raise ValueError(f"[forge_cache] expected {refusal}")
        by_decoding = decoded(text, whole, packed, reason)
        packed = packed if reason is None else list(by_decoding)  # the others belong to an encoder
        given = {"sparse": sparse, "eviction": eviction, "sharding": sharding, "graph=True": graph or None}
        if by_decoding and (unfit_options := [name for name, value in given.items() if value is not None]):
            raise ValueError(
                f"[forge_cache] expected no {' and no '.join(unfit_options)} with layers that are read by decoding; "
                + next(iter(by_decoding.values()))
            )
        if isinstance(model, torch.nn.Module):
            own = weight_codecs(model, self.spec, [i for i in packed if i not in own]) | own
        budgets: Mapping[int, Any] = {}
        if sparse is not None and sparse.budgets is not None:
            if not isinstance(model, torch.nn.Module):
                raise ValueError("[forge_cache] expected the model itself for budgets; got its config")
            budgets = Budgets.load(sparse.budgets, fingerprint(model)).layers
            if not set(packed) <= set(budgets):
                raise ValueError(f"[forge_cache] expected budgets of layers {packed}; got {sorted(budgets)}")
        stored = layers_that_share(text, len(layers))
        for i in packed:
            if i in by_decoding:
                layers[i] = DecodedLayer(self, own.get(i), i in stored, i in (codecs or ()))
            else:
                reading = None if sparse is None else SparseLayer(sparse, budgets.get(i), sparse_log)
                layers[i] = PackedLayer(self, own.get(i), i in stored, reading)
        self._codecs: dict[tuple[int, int], Codec] = {}
        self.eviction = eviction
        self._evicting: dict[str, Any] = {}
        if eviction is not None:
            rope = rope_of(config) if eviction.policy.scored else None
            self._evicting = {"rope": rope, "fraction": attention_fraction(config)}
        self._setup(layers)
        if sparse is not None:
            sparse.warn_of_min_context()
        for why in dict.fromkeys(by_decoding.values()):
            which = [i for i in by_decoding if by_decoding[i] == why]
            log.warning("ForgeCache reads layers %s by decoding them at every step: %s", which, why)
        if not self.coded:
            log.warning("ForgeCache packs no layer: the model has no full-attention layer of the stock kind")
        self.graph = None
        if graph and not isinstance(model, torch.nn.Module):
            raise ValueError("[forge_cache] expected the model itself for graph=True; got its config")
        if graph or (graph is None and isinstance(model, torch.nn.Module) and unfit(model, self) is None):
            self.graph = weakref.ref(attach(model, self))

    def _setup(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self.packed = [i for i, layer in enumerate(layers) if isinstance(layer, PackedLayer)]
        self.coded = [i for i, layer in enumerate(layers) if isinstance(layer, CodedLayer)]
        self.scratch = Scratch()
        # Only then is every user of the causal mask a packed layer.
        self.all_packed = not any(isinstance(x, DynamicLayer | DecodedLayer) and not x.is_sliding for x in layers)
        self.mixed = any(not isinstance(x, PackedLayer) and type(x).__name__ != "DummyLayer" for x in layers)
        self._seen_mask: tuple[Any, int, Keep | None] | None = None

    def codec(self, head_dim: int, kv_heads: int) -> Codec:
        """The codec of layers of this shape that were given none of their own."""
        key = head_dim, kv_heads
        if key not in self._codecs:
            self._codecs[key] = Codec(self.spec, head_dim, kv_heads)
        return self._codecs[key]

    def layer_options(self, layer: CodedLayer) -> dict[str, Any]:
        """What the `LayerCache` of one of the layers is told beyond its shape."""
        options: dict[str, Any] = {"sparse": layer.sparse, "sharding": self.sharding, "eviction": None}
        options["backend"] = self.backend
        if self.eviction is not None:
            number = next(i for i in self.packed if self.layers[i] is layer)
            centres = None if self.eviction.centres is None else self.eviction.centres[number].copy()
            options["eviction"] = Evictor(self.eviction, centres=centres, **self._evicting)
        return options

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        layer = self.layers[layer_idx]
        if isinstance(layer, CodedLayer) and layer.steps is None and layer_idx != self.coded[0]:
            first = self.layers[self.coded[0]].seen
            if first != layer.seen + key_states.shape[2]:
                raise ValueError(
                    f"[forge_cache] expected {first - key_states.shape[2]} positions in layer {layer_idx}, as in layer "
                    f"{self.coded[0]}; got {layer.seen}: an earlier step failed midway, reset the cache"
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        rows = beam_idx.tolist()
        for layer in self.layers:
            if isinstance(layer, CodedLayer):
                layer.select(rows)
            else:
                layer.reorder_cache(beam_idx)

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all layers, and those that packed ones are decoded into."""
        return self.report()["bytes"]

    def report(self) -> dict[str, Any]:
        """What is packed, per layer and in all (`cache.report` says what it holds)."""
        entries: list[dict[str, Any]] = []
        for i, layer in enumerate(self.layers):
            if isinstance(layer, CodedLayer):
                shape = (layer.kv_heads, *layer.head_dims) if layer.kv_heads and layer.head_dims else None
                kind = "decoded" if isinstance(layer, DecodedLayer) else "packed"
                entries.append(packed_entry(i, layer.cache, layer.codec, layer.seen, shape, kind))
            else:
                positions = layer.get_seq_length() if hasattr(layer, "get_seq_length") else None
                entries.append(stock_entry(i, type(layer).__name__, positions, hf_attention.tensor_bytes(layer)))
        out = totals(entries, len(self.layers))
        out["bytes"] += self.scratch.nbytes
        return out if self.eviction is None else {"eviction": {}, **out}

    def sparse_statistics(self) -> dict[str, float]:
        """What the last decode step left out, means over layers (`SparseStep.statistics`; bytes are sums); empty if
        nothing. Waits for the device."""
        caches = [self.layers[i].cache for i in self.packed]
        return sparse_means([c.sparse_step.statistics() for c in caches if c is not None and c.sparse_step is not None])

    def fork(self, rows: list[int] | None = None) -> ForgeCache:
        """A cache of the given rows (default: all) that shares this one's pages, as does `copy.deepcopy`."""
        other = object.__new__(ForgeCache)
        other.spec, other.max_pages, other.backend = self.spec, self.max_pages, self.backend
        other.sharding = self.sharding
        other.graph = None
        other._codecs, other.eviction, other._evicting = self._codecs, self.eviction, self._evicting
        layers: list[Any] = []
        for layer in self.layers:
            if isinstance(layer, CodedLayer):
                layers.append(layer.fork(other, rows))
            else:
                layers.append(copy.deepcopy(layer))
                if rows is not None:
                    layers[-1].reorder_cache(torch.tensor(rows))
        other._setup(layers)
        return other

    def join(self, other: ForgeCache) -> None:
        """Adds the rows of another cache of the same model behind this one's. Where one has seen fewer positions, its
        rows count as padded on the left.

        Raises:
            ValueError: a layer with a stock cache, or what `LayerCache.join` refuses; nothing has changed.
        """
        self._all_packed_or_raise("join")
        other._all_packed_or_raise("join")
        for i in self.coded:
            self.layers[i].check_join(other.layers[i])
        for i in self.coded:
            self.layers[i].join(other.layers[i])

    @property
    def is_initialized(self) -> bool:
        return all(getattr(layer, "is_initialized", True) for layer in self.layers)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Keys, values and window of each layer, as a `DynamicCache` gives them; those of packed tokens are decoded.

        Raises:
            ValueError: rows of different lengths, which padding makes.
        """
        for layer in self.layers:
            if isinstance(layer, CodedLayer):
                yield *layer.read(), None
            else:
                yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)

    def __getattr__(self, name: str) -> NoReturn:
        if name == "max_cache_len":  # PEFT asks before it puts a cache of its own in the place of an empty one
            raise AttributeError(
                "[forge_cache] expected no prefix tuning, which fills its own cache; got a question for max_cache_len: "
                "generate without past_key_values"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __reduce__(self) -> NoReturn:
        raise TypeError("[forge_cache] expected ForgeCache.save(path, model); got pickle, which cannot follow pages")

    def __copy__(self) -> ForgeCache:
        return self.fork()

    def __deepcopy__(self, memo: object) -> ForgeCache:
        return self.fork()

    def save(self, path: str | os.PathLike[str], model: Any) -> None:
        """Saves the cache of a model whose layers are all packed (see `forgeattention.cache.save`).

        Raises:
            ValueError: a layer with a stock cache, or one without tokens.
        """
        self._all_packed_or_raise("save")
        layers = {i: self.layers[i].cache for i in self.coded}
        if any(cache is None for cache in layers.values()):
            raise ValueError("[cache.save] expected tokens in every layer; got an empty cache")
        extra = {"spec": self.spec.to_json(), "layers": {str(i): self.layers[i].state() for i in self.coded}}
        storage.save(path, layers, fingerprint(model), extra)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: Any, spec: CodecSpec | str | None = None, **options: Any
    ) -> ForgeCache:
        """Reads a saved cache.

        Args:
            path, model: of the cache.
            spec: None for that in the file; another is refused.
            options: as when the cache was made.

        Raises:
            ValueError: a damaged file, or another format version, model or codec.
        """
        if spec is None:
            told = storage.saved_extra(path)
            if not isinstance(told, dict) or not isinstance(told.get("spec"), str):
                raise ValueError(f"[cache.load] expected a cache of ForgeCache.save; got {path}, which names no spec")
            spec = CodecSpec.from_json(told["spec"])
        self = cls(model, spec, **options)
        self._all_packed_or_raise("load")
        states = storage.saved_extra(path)["layers"]
        try:
            shapes = {i: (states[str(i)]["kv_heads"], *states[str(i)]["head_dims"]) for i in self.coded}
        except (KeyError, TypeError) as error:
            raise ValueError(f"[cache.load] expected heads of layers {self.coded}; got {error}") from None
        codecs = {i: self.layers[i].codec_for(*shape) for i, shape in shapes.items()}
        layers, extra = storage.load(
            path,
            codecs,
            fingerprint(model),
            TorchArrays(model.device),
            max_pages=self.max_pages,
            options={i: self.layer_options(self.layers[i]) for i in self.coded},
        )
        if not isinstance(extra, dict) or set(extra.get("layers", ())) != {str(i) for i in layers}:
            raise ValueError(f"[cache.load] expected a cache of ForgeCache.save; got {path}, which says no layers")
        for i, cache in layers.items():
            self.layers[i].restore(cache, extra["layers"][str(i)])
        return self

    @classmethod
    def from_calibration(cls, model: Any, path: str | os.PathLike[str], **options: Any) -> ForgeCache:
        """A cache with the bits of a calibration file (`forgeattn calibrate`); `options` as for the constructor.

        Raises:
            ValueError: a damaged file, or one made for another model or format version.
        """
        from ...models.calibration import Calibration

        calibration = Calibration.load(path, model)
        return cls(model, calibration.spec, codecs=calibration.codecs(model), **options)

    def _all_packed_or_raise(self, what: str) -> None:
        stock = [
            i for i, x in enumerate(self.layers) if not isinstance(x, CodedLayer) and type(x).__name__ != "DummyLayer"
        ]
        if stock:
            raise ValueError(f"[cache.{what}] expected packed layers only; got stock caches in layers {stock}")

    def new_tokens(self, mask: Any, layer: PackedLayer, n: int, appended: bool) -> Keep | None:
        """Which of a layer's n new positions hold real tokens, [batch, n]; None for all. All layers of a step share
        one mask."""
        if mask is None:
            # All new tokens are real, and earlier padding stays hidden; stock layers have forgotten theirs.
            if layer.padded and self.mixed:
                raise ValueError(
                    "[forge] expected the attention_mask of all positions, since earlier ones are padding; got none"
                )
            return None
        past = layer.seen - n if appended else layer.seen
        if self._seen_mask is not None and self._seen_mask[0]() is mask and self._seen_mask[1] == past:
            return self._seen_mask[2]
        keep = hf_attention.padding(mask, layer.real(0, past), n)
        self._seen_mask = weakref.ref(mask), past, keep
        return keep
