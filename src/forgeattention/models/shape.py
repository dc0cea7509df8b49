"""The shape of a model, read from its config: layers, heads, dimensions, parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..codec.spec import HEAD_DIMS, PAGE, CodecSpec
from ..util.files import read_json
from .names import resolve

CHUNK = 512
"""Prompt tokens read at once, for the working set."""
Kind = Literal["full", "sliding", "state", "hybrid", "shared"]


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps in a cache, for one sequence.

    Attributes:
        kind: "full" attention, "sliding" window, a recurrent "state", "hybrid" of full attention and state, or "shared"
            (reads another layer's keys).
        kv_heads, k_dim, v_dim: of its keys and values.
        window: most tokens kept, or None.
        state: elements that do not grow with the sequence.
    """

    kind: Kind
    kv_heads: int = 0
    k_dim: int = 0
    v_dim: int = 0
    window: int | None = None
    state: int = 0

    @property
    def packable(self) -> bool:
        """Whether a packed cache holds it. mlx-lm's packs keys and values of other widths too, at the next head_dim."""
        return self.kind == "full" and self.k_dim == self.v_dim and self.k_dim in HEAD_DIMS

    def elements(self, tokens: int) -> int:
        """Key and value elements after `tokens` tokens."""
        kept = tokens if self.window is None else min(tokens, self.window)
        return kept * self.kv_heads * (self.k_dim + self.v_dim)


@dataclass(frozen=True)
class Model:
    """What a plan needs to know of a model.

    Attributes:
        parameters: all of them, tied ones once.
        weight_bytes: parameters at their stored width.
        itemsize: bytes of an activation and of an exact cache element.
        layers: one per layer.
        activations: elements alive at once per prompt token, the largest block.
        vocabulary: logits of one position.
        positions: the longest context that the model was made for, or None.
    """

    parameters: int
    weight_bytes: int
    itemsize: int
    layers: tuple[LayerShape, ...]
    activations: int
    vocabulary: int
    positions: int | None

    def working_bytes(self) -> int:
        """An estimate of what a step needs beside weights and cache: a chunk's activations, float32 logits."""
        return CHUNK * self.activations * self.itemsize + 2 * 4 * self.vocabulary

    def exact_bytes(self, tokens: int) -> int:
        """Bytes of the model's own cache."""
        return sum(layer.elements(tokens) + layer.state for layer in self.layers) * self.itemsize

    def affine_bytes(self, tokens: int, bits: float) -> int:
        """Bytes of a cache whose full-attention layers keep `bits` per element, scales included."""
        full = sum(layer.elements(tokens) for layer in self.layers if layer.kind == "full")
        return self.exact_bytes(tokens) - full * self.itemsize + int(full * bits / 8)

    def packed_bytes(self, tokens: int, spec: CodecSpec) -> int:
        """Bytes of a `ForgeCache`: records and their table, the exact buffer, and what cannot be packed.

        The pool's spare pages (under 1 %) are left out.
        """
        total = 0
        buffer = spec.sinks + spec.window + PAGE
        pages = max(0, (tokens - buffer) // PAGE + 1)
        for layer in self.layers:
            if layer.packable:
                record = spec.page_format(layer.k_dim).record_bytes
                total += pages * (layer.kv_heads * record + 8) + layer.elements(buffer) * self.itemsize
            else:
                total += (layer.elements(tokens) + layer.state) * self.itemsize
        return total


def inspect(config: Any, *, weight_bits: float | None = None) -> Model:
    """Read a transformers config; the model is laid out without memory to count parameters and see each layer's shape.

    Args:
        config: a transformers config.
        weight_bits: bits per parameter, scales included; from the config if None (its dtype, or its quantization of
            matrices).

    Raises:
        ValueError: a layer of a kind that is not known here.
    """
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    text = config.get_text_config(decoder=True)
    dtype = getattr(text, "dtype", None) or getattr(config, "dtype", None) or torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    parameters = {id(p): p.numel() for p in model.parameters()}
    matrices = {id(p): p.numel() for p in model.parameters() if p.ndim > 1}
    count = sum(parameters.values())
    bits = quantized_bits(config) if weight_bits is None else weight_bits
    weight_bytes = count * dtype.itemsize
    if bits is not None:
        weight_bytes += int(sum(matrices.values()) * (bits / 8 - dtype.itemsize))
    mixers: dict[int, list[Any]] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "vision" not in name and "audio" not in name:
            mixers.setdefault(index, []).append(module)
    caches = DynamicCache(config=config).layers
    layers = tuple(_shape(i, layer, mixers.get(i, []), text) for i, layer in enumerate(caches))
    wide = max(getattr(text, "intermediate_size", 0) or 0, _expert_width(text))
    q_heads = text.num_attention_heads
    widest = max((layer.k_dim for layer in layers), default=0)
    activations = 3 * text.hidden_size + 3 * max(wide, q_heads * widest)
    positions = getattr(text, "max_position_embeddings", None)
    return Model(count, weight_bytes, dtype.itemsize, layers, activations, text.vocab_size, positions)


def read_config(name: str) -> Any:
    """The config of a model by name, folder, .gguf file or hub id, or a config.json itself; no weights are read.

    Raises:
        ValueError: none of these, or an architecture that transformers does not know.
    """
    from transformers import AutoConfig

    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".json":
        fields = read_json(path, "plan", "a config.json")
        if not isinstance(fields, dict) or "model_type" not in fields:
            raise ValueError(f"[plan] expected a config.json with model_type; got {name!r}")
        return AutoConfig.for_model(**fields)
    source = resolve(name)
    if source.kind == "gguf":
        file = Path(source.location)
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    return AutoConfig.from_pretrained(source.location)


def quantized_bits(config: Any) -> float | None:
    """Bits per matrix element of a config that says so: mlx's "quantization", GPTQ's and AWQ's "bits"."""
    for name in ("quantization", "quantization_config"):
        found: Any = getattr(config, name, None)
        fields = found.to_dict() if hasattr(found, "to_dict") else found
        if isinstance(fields, Mapping) and "bits" in fields:
            return fields["bits"] + 32 / fields.get("group_size", 128)
        if isinstance(fields, Mapping) and (fields.get("load_in_4bit") or fields.get("quant_method") == "mxfp4"):
            return 4.25
    return None


def _expert_width(text: Any) -> int:
    each = getattr(text, "moe_intermediate_size", 0) or 0
    active = getattr(text, "num_experts_per_tok", 0) or 0
    return each * active if isinstance(each, int) and isinstance(active, int) else 0


def _shape(index: int, layer: Any, mixers: list[Any], text: Any) -> LayerShape:
    """The shape of one cache layer, from its class and the modules that fill it."""
    from transformers import cache_utils as kinds

    if type(layer).__name__ == "DummyLayer":  # not in every version
        return LayerShape("shared")
    if type(layer) is kinds.LinearAttentionLayer:
        return LayerShape("state", state=_state(index, mixers))
    if type(layer) not in (
        kinds.DynamicLayer,
        kinds.DynamicSlidingWindowLayer,
        kinds.LinearAttentionAndFullAttentionLayer,
    ):
        raise ValueError(f"[plan] expected attention or linear attention in layer {index}; got {type(layer).__name__}")
    attention = [m for m in mixers if any(hasattr(m, name) for name in ("k_proj", "qkv_proj", "query_key_value"))]
    if not attention or hasattr(attention[0], "kv_b_proj"):
        got = [type(m).__name__ for m in mixers]
        raise ValueError(f"[plan] expected layer {index} to project keys and values by head; got {got}")
    dim = getattr(attention[0], "head_dim", None) or text.hidden_size // text.num_attention_heads
    k_proj: Any = getattr(attention[0], "k_proj", None)
    heads = k_proj.out_features // dim if hasattr(k_proj, "out_features") else text.num_key_value_heads
    if type(layer) is kinds.LinearAttentionAndFullAttentionLayer:
        return LayerShape("hybrid", heads, dim, dim, state=_state(index, mixers))
    # transformers keeps window - 1 tokens of the past in one tensor with the newest.
    window = layer.sliding_window if isinstance(layer, kinds.DynamicSlidingWindowLayer) else None
    return LayerShape("full" if window is None else "sliding", heads, dim, dim, window)


def _state(index: int, mixers: list[Any]) -> int:
    """Elements of a recurrent layer's state: those of gated delta nets, short convolutions and Mamba 2."""

    def sizes(module: Any, *names: str) -> list[int] | None:
        found = [size for name in names if isinstance(size := getattr(module, name, None), int)]
        return found if len(found) == len(names) else None

    for mixer in mixers:
        if size := sizes(mixer, "conv_dim", "conv_kernel_size", "num_v_heads", "head_k_dim", "head_v_dim"):
            return size[0] * size[1] + size[2] * size[3] * size[4]
        if size := sizes(mixer, "conv_dim", "conv_kernel_size", "num_heads", "head_dim", "ssm_state_size"):
            return size[0] * size[1] + size[2] * size[3] * size[4]
        if hasattr(mixer, "conv") and (size := sizes(mixer, "conv_kernel_size")):
            return mixer.conv.in_channels * size[0]
    got = [type(m).__name__ for m in mixers]
    raise ValueError(f"[plan] expected a known kind of state in layer {index}; got {got}")


def head_dim(model: Any) -> int:
    """Channels of one attention head of `model`."""
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
