"""Codecs fitted to the weights in a model's checkpoint: vLLM fuses, shards and repacks those that it loads."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ...codec import Codec
from ...codec.spec import CodecSpec
from .fit import KeyWeights
from .hf import key_weights

log = logging.getLogger("forgeattention")

_known: dict[str, dict[int, KeyWeights | str]] = {}


def layer_codec(
    vllm_config: Any, name: str, spec: CodecSpec, head_dim: int, kv_heads: int, *, fit: bool = True
) -> Codec:
    """The codec of one attention layer of this tensor-parallel rank.

    Args:
        vllm_config: the engine's VllmConfig.
        name: the layer's name, which holds its number.
        spec: how keys and values are coded.
        head_dim: channels per head.
        kv_heads: KV heads of this rank.
        fit: fit the keys' codec to the weights in the checkpoint; else it follows from `spec` alone.
    """
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    number = re.search(r"\.(\d+)\.", name)
    found: KeyWeights | str | None = None
    if fit and number is not None:
        model = vllm_config.model_config
        if model.model not in _known:
            _known[model.model] = _checkpoint_weights(model.model, model.hf_config)
        found = _known[model.model].get(int(number[1]))
    if not isinstance(found, KeyWeights):
        return Codec(spec, head_dim, kv_heads)
    rank, ranks, heads = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size(), len(found.diagonal)
    # With fewer KV heads than ranks, each is held by several ranks in turn.
    first = rank * kv_heads if heads >= ranks else rank * heads // ranks
    mine = slice(first, first + kv_heads)
    return KeyWeights(found.diagonal[mine], found.query_energy[mine]).codec(spec)


def _checkpoint_weights(model: str, config: Any) -> dict[int, KeyWeights | str]:
    """What the checkpoint says about each layer's keys; empty, with a warning, where it cannot be read here.

    Only query and key projections and norms are read, one layer's worth of other memory at a time.
    """
    from transformers import AutoModelForCausalLM

    try:
        files = _files(model)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        log.warning("keys are coded without the model's weights: %s", error)
        return {}
    for prefix, module in skeleton.named_modules():
        attention = getattr(module, "self_attn", None)
        if attention is None:
            continue
        wanted = [("self_attn." + child, m) for child, m in attention.named_children() if _tells_of_keys(child)]
        norm = getattr(module, "input_layernorm", None)
        for child, part in [*wanted, ("input_layernorm", norm)]:
            if part is not None:
                _fill(part, f"{prefix}.{child}", files)
    return key_weights(skeleton)


def _tells_of_keys(name: str) -> bool:
    return name in ("q_proj", "k_proj", "qkv_proj", "q_norm", "k_norm")


def _fill(part: torch.nn.Module, prefix: str, files: dict[str, Path]) -> None:
    """Gives a module on the meta device its weights, as far as the checkpoint has them by that name."""
    state = {}
    for name, _ in part.named_parameters():
        path = files.get(f"{prefix}.{name}")
        if path is not None:
            with safe_open(path, framework="pt") as file:
                state[name] = file.get_tensor(f"{prefix}.{name}")
    part.load_state_dict(state, strict=False, assign=True)


def _files(model: str) -> dict[str, Path]:
    """The safetensors file of each tensor of a model: a folder, or a hub id that is on this machine.

    Raises:
        ValueError: there are none.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=["*.safetensors"], local_files_only=True))
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    if not files:
        raise ValueError(f"{folder} holds no safetensors")
    return files
