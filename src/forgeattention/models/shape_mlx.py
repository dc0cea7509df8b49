"""The shape of a model as mlx-lm builds it, without torch: `models.shape.inspect` for machines that have MLX alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..util.files import read_json
from .names import resolve
from .shape import LayerShape, Model, quantized_bits

ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


def read_config(name: str) -> dict[str, Any]:
    """The config.json of a folder or hub id, or a config.json itself; no weights are read.

    Raises:
        ValueError: none of these.
    """
    path = Path(name).expanduser()
    if not (path.is_file() and path.suffix == ".json"):
        source = resolve(name)
        if source.kind == "gguf":
            raise ValueError(f"[plan] expected a folder, hub id or config.json for mlx-lm; got {name!r}, a GGUF file")
        path = Path(source.location) / "config.json"
        if source.kind == "hub":
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(source.location, "config.json"))
    fields = read_json(path, "plan", "a config.json")
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ValueError(f"[plan] expected a config.json with model_type; got {name!r}")
    return fields


def inspect(config: Mapping[str, Any], *, weight_bits: float | None = None) -> Model:
    """The shape of the model that mlx-lm makes of a config. Its weights and a pass over two tokens are never evaluated,
    so that neither takes memory.

    Args:
        config: the fields of a config.json.
        weight_bits: bits per parameter of matrices, scales included; from the config if None.

    Raises:
        ValueError: an architecture that mlx-lm does not know, or a cache whose size is not known here.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm import utils
    from mlx_lm.models import cache as stock

    kind, arguments = utils._get_classes(dict(config))
    model = kind(arguments.from_dict(dict(config)))
    parameters = [p for _, p in tree_flatten(model.parameters())]
    count = sum(p.size for p in parameters)
    text = {**config, **config.get("text_config", {})}
    itemsize = ITEMSIZES.get(str(text.get("dtype") or text.get("torch_dtype") or "bfloat16"), 2)
    bits = quantized_bits(SimpleNamespace(**config)) if weight_bits is None else weight_bits
    weight_bytes = count * itemsize
    if bits is not None:
        weight_bytes += int(sum(p.size for p in parameters if p.ndim > 1) * (bits / 8 - itemsize))
    caches = stock.make_prompt_cache(model)
    logits = model(mx.zeros((1, 2), dtype=mx.int32), cache=caches)
    layers = tuple(_shape(i, layer) for i, layer in enumerate(caches))
    hidden, heads = int(text["hidden_size"]), int(text.get("num_attention_heads", 1))
    widest = max((layer.k_dim for layer in layers), default=0)
    activations = 3 * hidden + 3 * max(int(text.get("intermediate_size") or 4 * hidden), heads * widest)
    positions = text.get("max_position_embeddings")
    return Model(count, weight_bytes, itemsize, layers, activations, logits.shape[-1], positions)


def _shape(index: int, layer: Any) -> LayerShape:
    from mlx_lm.models import cache as stock

    if type(layer) is stock.CacheList:
        parts = [_shape(index, part) for part in layer.caches]
        full = [part for part in parts if part.kind == "full"]
        if len(full) == 1 and all(part.kind in ("full", "state") for part in parts):
            state = sum(part.state for part in parts)
            return LayerShape("hybrid", full[0].kv_heads, full[0].k_dim, full[0].v_dim, state=state)
    elif type(layer) in (stock.KVCache, stock.RotatingKVCache, stock.ChunkedKVCache):
        if layer.keys is None:
            return LayerShape("shared")
        (_, heads, _, k_dim), v_dim = layer.keys.shape, layer.values.shape[3]
        window = getattr(layer, "max_size", None) or getattr(layer, "chunk_size", None)
        return LayerShape("full" if window is None else "sliding", heads, k_dim, v_dim, window)
    elif type(layer) is stock.ArraysCache:
        return LayerShape("state", state=sum(x.size for x in layer.cache if x is not None))
    raise ValueError(f"[plan] expected attention or a recurrent state in layer {index}; got {type(layer).__name__}")
