"""A tiny model of random weights of every family that transformers' causal mapping names, and what a ForgeCache does
with it. As a command it writes the table of docs/families.md."""

from __future__ import annotations

import json
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from hf_slow import slow_cache
from tolerances import HF
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, DynamicCache

from forgeattention import CodecSpec
from forgeattention.integrations.hf.cache import ForgeCache

LAYERS = 2
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 128, "d_model": 128, "n_embd": 128, "n_embed": 128, "dim": 128, "emb_dim": 128,
    "intermediate_size": 64, "n_inner": 64, "ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64, "d_ff": 64,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "ffn_hidden_size": 64, "d_inner": 64,
    "intermediate_size_mlp": 64, "num_hidden_layers": LAYERS, "n_layer": LAYERS, "num_layers": LAYERS,
    "n_layers": LAYERS, "decoder_layers": LAYERS, "encoder_layers": LAYERS, "num_decoder_layers": LAYERS,
    "num_attention_heads": 2, "n_head": 2, "n_heads": 2, "num_heads": 2, "attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_attention_heads": 2, "num_key_value_heads": 2, "num_kv_heads": 2,
    "head_dim": 64, "kv_channels": 64, "attention_head_dim": 64, "d_kv": 64, "max_position_embeddings": 512,
    "n_positions": 512, "n_ctx": 512, "max_seq_len": 512, "num_local_experts": 4, "num_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "embedding_size": 128, "input_embedding_size": 128, "output_embedding_size": 128, "word_embed_proj_dim": 128,
    "rotary_dim": 16, "is_decoder": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "moe_num_experts": 4, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
    "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "attention_dropout": 0.0, "resid_pdrop": 0.0,
    "attn_pdrop": 0.0, "embd_pdrop": 0.0, "dropout": 0.0, "activation_dropout": 0.0, "hidden_dropout": 0.0,
    "initializer_range": 0.15,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text())
"""By family, what its config needs beside `SIZES`: one layer of each kind, sizes with names of their own."""


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # differs between layers
        return 0


def config_of(kind: type, **changes: Any) -> Any:
    """A tiny config of a class of transformers."""
    try:
        default = kind()
    except Exception:  # a config that is not valid by itself
        default = kind(**OWN[kind.model_type])
    own = {**SIZES, **OWN.get(kind.model_type, {}), **changes}
    known = set(default.to_dict()) | set(getattr(default, "attribute_map", {}))
    given: dict[str, Any] = {}
    for name, value in own.items():
        if name in OWN.get(kind.model_type, {}) or name in changes:
            given[name] = value
        elif name in known and (_value(default, name) is not None or name.endswith("token_id")):
            target = getattr(default, "attribute_map", {}).get(name, name)
            if target != name and target in own:
                continue
            given[name] = value
    text = getattr(default, "text_config", None)
    if text is not None:
        given = {
            **{k: v for k, v in given.items() if k.endswith("token_id")},
            "text_config": config_of(type(text), **changes).to_dict(),
        } | OWN.get(kind.model_type, {})
    return kind(**given)


N = 122
STEPS = ((0, 90), (90, 120), (120, 121), (121, N))
SPEC = CodecSpec(sinks=3, window=12, refine=False)
ALL_EXACT = CodecSpec(window=4096)
ONE_BY_ONE = ("prophetnet",)
"""Families that take one token at a time with a cache."""
TAKES_ALL = ("cpmant",)
"""Families that are given the whole text at each step and leave out what the cache holds."""
WITHOUT = "load it without attn_implementation='forge'"
"""Said of models whose class computes attention in its own code: their own implementation reads decoded keys."""
LARGEST = 8_000_000
"""Parameters of the largest model that is built."""
UNBUILT = {
    "dots3_note": "no tiny vision part",
    "dots3_note_text": "no tiny form of its experts",
    "gemma3n": "needs timm",
    "gemma4_assistant": "drafts for another model, whose keys it reads",
    "gemma4_unified_assistant": "drafts for another model, whose keys it reads",
    "moss_transcribe_diarize": "no tiny audio part",
    "musicgen": "is built from three configs",
    "musicgen_melody": "is built from three configs",
    "phi4_multimodal": "no tiny vision and audio parts",
}


@dataclass(frozen=True)
class Found:
    """What became of a family.

    Attributes:
        outcome: "packed" (some layers, and right), "stock" (no layer, and right), "refused" (by a ValueError of ours
            when the model is loaded or the cache made), "unbuilt" (no tiny model), else a defect: "wrong" or "unclear".
        layers: packed layers, of all.
        text: the error.
        reading: what reads packed layers: "kernels", "decoding" or "both".
    """

    outcome: Literal["packed", "stock", "refused", "unbuilt", "wrong", "unclear"]
    layers: tuple[int, int] = (0, 0)
    text: str = ""
    reading: str = ""


def names() -> list[str]:
    """The families, less those of which no tiny model can be built here."""
    found = dict.fromkeys(kind.model_type for kind in MODEL_FOR_CAUSAL_LM_MAPPING)
    return [name for name in found if name not in UNBUILT]


def examine(name: str) -> Found:
    """Reads a text in four steps with a `ForgeCache` and with stock caches, by eager attention: exact ones, and ones
    that hold what the packed ones decode to."""
    kind = next(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING if kind.model_type == name)
    config = config_of(kind)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    if sum(p.numel() for p in skeleton.parameters()) > LARGEST:
        return _refused_by_config(config)
    torch.manual_seed(0)
    ids = torch.randint(3, 90, (1, N))
    try:
        try:
            made, exact, packed = _made(config, "forge")
        except ValueError as error:
            if WITHOUT not in str(error):
                raise
            made, exact, packed = _made(config, "eager")
    except Exception as error:
        return _error(error)
    for parameter in made.parameters():
        if parameter.ndim == 2 and parameter.std() < 0.1:
            parameter.normal_(0, 0.1)
    try:
        found = [_read(made, ids, cache) for cache in (exact, packed)]
    except Exception as error:
        return Found("unclear", text=f"in the forward: {type(error).__name__}: {error}")
    held = [layer.cache.packed_lengths.min() for layer in packed.layers if getattr(layer, "cache", None) is not None]
    if made.config._attn_implementation == "forge":
        made.set_attn_implementation("eager")
    errors = [_error_of(found[0], _read(made, ids, DynamicCache(config=made.config))) / HF["same_values"]]
    if held:
        slow = slow_cache(made.config, SPEC, [0], like=packed)
        errors.append(_error_of(found[1], _read(made, ids, slow)) / HF["codes"])
    if not max(errors) < 1:
        return Found("wrong", text=f"errors over their bounds: {errors}")
    layers = len(held), len(packed.layers)
    if packed.coded and not (len(held) == len(packed.coded) and min(held) > 0):
        return Found("wrong", layers, "layers that are called packed and hold no packed tokens")
    decoded = packed.report()["decoded"]
    reading = "" if not held else "kernels" if not decoded else "decoding" if decoded == len(held) else "both"
    return Found("packed" if held else "stock", layers, reading=reading)


def _made(config: Any, implementation: str) -> tuple[Any, ForgeCache, ForgeCache]:
    made = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval().requires_grad_(False)
    exact, packed = ForgeCache(made, ALL_EXACT, backend="reference"), ForgeCache(made.config, SPEC, backend="reference")
    if packed.report()["decoded"]:  # by what the classes are; the model says which layers it has
        packed = ForgeCache(made, SPEC, backend="reference")
    return made, exact, packed


def _read(made: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    whole = made.config.model_type in TAKES_ALL
    parts = [(i, i + 1) for i in range(N)] if made.config.model_type in ONE_BY_ONE else STEPS
    with torch.no_grad():
        steps = [made(ids[:, 0 if whole else a : b], past_key_values=cache, use_cache=True).logits for a, b in parts]
    return torch.cat(steps, 1)


def _error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _error(error: Exception) -> Found:
    ours = isinstance(error, ValueError) and str(error).startswith(("[forge]", "[forge_cache]"))
    return Found("refused" if ours else "unclear", text=str(error) if ours else f"{type(error).__name__}: {error}")


def _refused_by_config(config: Any) -> Found:
    """For models whose other parts (vision, audio) have no tiny form."""
    try:
        ForgeCache(config, SPEC, backend="reference")
    except Exception as error:
        return _error(error)
    return Found("unbuilt", text="no tiny model")


def table() -> str:
    """docs/families.md."""
    rows, counts = [], Counter()
    everything = sorted({*names(), *UNBUILT})
    for name in everything:
        found = Found("unbuilt", text=UNBUILT[name]) if name in UNBUILT else examine(name)
        print(name, found, file=sys.stderr, flush=True)
        counts[found.outcome] += 1
        text = found.text.partition("; got ")[2].partition(":")[0] if found.outcome == "refused" else found.text
        if found.reading == "decoding":
            counts["decoding"] += 1
        layers = f"{found.layers[0]} of {found.layers[1]}" if found.outcome in ("packed", "stock") else ""
        row = f"| {name} | {found.outcome} | {layers} | {found.reading} | "
        rows.append(row + textwrap.shorten(text, 97 - len(row), placeholder=" ...") + " |")
    decoding = counts.pop("decoding")
    total = ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common())
    total += f". Of the packed ones, {decoding} are read by decoding"
    return TABLE.format(version=transformers.__version__, total=total, rows="\n".join(rows))


TABLE = """# Model families

What `ForgeCache` does with each family that transformers {version} names as a causal language model:
{total}.

The table is written by `python tests/families.py`, which builds a small model of random weights of
each family and compares its logits with those of a stock cache that holds the same decoded values.

- *packed*: the layers with full attention are packed and right; the others keep the stock cache.
  "read by" says how: *kernels* read the packed bits. By *decoding*, the layer gives the model
  decoded keys and values, because its attention is its own code, has latents of two widths (MLA),
  soft-capped scores, ALiBi or the like. Memory is as small, but each step decodes the layer's pages
  whole, into memory that all layers share. Sparse attention, eviction, context parallelism and CUDA
  graphs are refused for such models, and `ForgeCache` logs which layers they are. Where the class
  computes attention in its own code, load the model without `attn_implementation="forge"`. What
  such a step costs beside a stock cache has not been measured yet. BigBird is packed with
  `attention_type="original_full"` alone.
- *stock*: right, and no layer is packed (recurrent states, attention to keys that an indexer
  chose).
- *refused*: a `ValueError` says why when the model is loaded or the cache is made.
- *unbuilt*: this program makes no small model of the family, so nothing is known.

Layers that are packed depend on the config: those with a sliding window keep the stock cache. The
small models have one layer of each kind where the family mixes kinds.

Encoder-decoder models take
`EncoderDecoderCache(ForgeCache(model), DynamicCache(config=model.config))`. `generate_batch` is
transformers' continuous batching, which takes caches of its own only.

`crop` and `batch_select_indices` of that pair want two caches of transformers' own kind: call them
on its `self_attention_cache`.

| family | outcome | packed layers | read by | what was met |
|---|---|---|---|---|
{rows}
"""

if __name__ == "__main__":
    Path(__file__).parents[1].joinpath("docs", "families.md").write_text(table())
