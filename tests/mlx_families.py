"""Tiny models of every architecture that mlx-lm has: one value for each argument, the same for all but where a family
needs another. As a program it prints the table of docs/mlx-families.md:

    PYTHONPATH=src:tests python tests/mlx_families.py > docs/mlx-families.md
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx_lm.models
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models import cache as stock
from mlx_models import SPEC, slow_prompt_cache, weights

from forgeattention.integrations import mlx as forge

WIDTH = 256
GENERIC: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "hidden_dim", "block_dim", "intermediate_size"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_transformer_layers"), 4),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "layernorm_epsilon"), 1e-5),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "model_max_length", "block_size"), 4096),
    **dict.fromkeys(("rope_theta", "swa_rope_theta", "rotary_emb_base"), 10000.0),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("ffn_hidden_size", "expert_ffn_hidden_size", "intermediate_size_mlp", "ff_intermediate_size"), 64),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "num_shared_expert", "n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "zero_expert_num", "decoder_sparse_step"), 1),
    **dict.fromkeys(("moe_layer_freq", "mamba_expand", "layer_group_size", "group_norm_size", "rotary_pct"), 1),
    **dict.fromkeys(("logits_scaling", "embedding_multiplier", "residual_multiplier", "scale_depth", "scale_emb"), 1.0),
    **dict.fromkeys(("head_dim", "index_head_dim", "swa_head_dim", "swa_v_head_dim", "v_head_dim"), 64),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "a_low_rank_dim", "v_low_rank_dim"), 64),
    **dict.fromkeys(("gate_low_rank_dim", "decay_low_rank_dim", "mamba_head_dim"), 64),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "state_size", "time_step_rank", "ssm_state_size"), 32),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state"), 32),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "n_groups", "index_n_heads"), 2),
    **dict.fromkeys(("conv_kernel", "linear_conv_kernel_dim", "conv_L_cache", "mamba_d_conv", "conv1d_width"), 4),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size"), 40),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "conv_bias", "use_conv_bias", "mamba_proj_bias"), False),
    **dict.fromkeys(("tie_word_embeddings", "use_qk_norm", "norm_topk_prob", "qk_norm", "post_norm"), True),
    "vocab_size": 97,
    "partial_rotary_factor": 0.5,
    "routed_scaling_factor": 1.0,
    "attention_multiplier": 0.125,
    "mlp_only_layers": [],
    "index_topk": 16,
    "mamba_num_heads": 4,
    "dim_model_base": 256,
    "logits_soft_cap": 30.0,
}
"""Values of arguments by name."""
LAYERS = ["sliding_attention", "full_attention"] * 2
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ROPES = {"full_attention": ROPE, "sliding_attention": ROPE}
LATENT = {"kv_lora_rank": 64, "q_lora_rank": 64, "rope_scaling": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 2},
    "afmoe": {"layer_types": LAYERS},
    "baichuan_m1": {"conv_window": 2, "sliding_window_layers": [0, 2], "tie_word_embeddings": False},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": {"type": "yarn", "factor": 1.0}},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": LAYERS, "is_moe_layer": [False, True] * 2},
    "gear": {"layer_types": LAYERS},
    "gemma2": {"query_pre_attn_scalar": 64},
    "gemma3_text": {"sliding_window_pattern": 2},
    "gemma4_text": {
        **{"num_kv_shared_layers": 2, "sliding_window_pattern": 2, "global_head_dim": 128},
        **{"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 97},
    },
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {"rope_parameters": ROPE, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "gpt_bigcode": {"n_inner": 256},
    "granitemoehybrid": {"layer_types": ["attention"] * 4, "num_local_experts": None},
    "hunyuan": {
        "cla_share_factor": 2,
        "use_cla": True,
        "use_mixed_mlp_moe": True,
        "moe_topk": [2] * 4,
        "num_shared_expert": [1] * 4,
    },
    "jamba": {
        **{"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
        "num_experts": 2,
    },
    "kimi_linear": {
        "linear_attn_config": {
            **{"kda_layers": [1, 2, 3], "full_attn_layers": [4], "num_heads": 2, "head_dim": 32},
            "short_conv_kernel_size": 4,
        },
        **{"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64},
    },
    "lfm2": {
        **{"block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "block_multiple_of": 64},
        "full_attn_idxs": [1, 3],
    },
    "lfm2_moe": {"use_expert_bias": False, "full_attn_idxs": [1, 3], "layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash": {
        **{"zero_expert_type": "identity", "attention_method": "MLA"},
        **{"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    },
    "longcat_flash_ngram": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "mamba2": {"time_step_limit": (0.001, 100.0), "num_heads": 8, "head_dim": 64},
    "mellum": {"layer_types": LAYERS, "rope_parameters": ROPES},
    "mimo_v2_flash": {
        **{"hybrid_layer_pattern": [1, 0, 1, 0], "moe_layer_freq": [0, 1, 1, 1], "topk_method": "noaux_tc"},
        **{"scoring_func": "sigmoid", "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False},
        **{"head_dim": 96, "v_head_dim": 64, "swa_head_dim": 96, "swa_v_head_dim": 64},
    },
    "minicpm3": {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 16,
            "long_factor": [1.0] * 16,
            "original_max_position_embeddings": 4096,
        }
    },
    "ministral3": {"rope_parameters": {**ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4096}},
    "mistral4": {"rope_parameters": {**ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4096}},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {"block_configs": [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}] * 4},
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "*"], "num_hidden_layers": 4},
    "olmo_hybrid": {
        "linear_allow_neg_eigval": True,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "openelm": {
        **{"model_dim": 256, "ffn_dim_divisor": 64, "ffn_multipliers": [1.0] * 4},
        **{"num_query_heads": [4] * 4, "num_kv_heads": [2] * 4},
    },
    "phi3small": {"dense_attention_every_n_layers": 2, "gegelu_limit": 20.0},
    "phixtral": {"num_heads": 4, "model_dim": 256, "rotary_dim": 32, "num_vocab": 97, "num_layers": 4},
    "plamo": {"n_shared_head": 2},
    "qwen": {"kv_channels": 64, "intermediate_size": 512},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "spark2_5": {"rope_parameters": ROPES, "layer_types": LAYERS},
    "stablelm": {"use_qkv_bias": False},
    "step3p5": {
        "num_attention_groups": 2,
        "layer_types": LAYERS,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 64,
        "moe_layers_enum": "2,3",
    },
}
"""What an architecture needs otherwise."""
WRAPPED: dict[str, dict[str, Any]] = {
    "gemma3": {"model_type": "gemma3_text"},
    "gemma3n": {
        **{"layer_types": LAYERS, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 97, "laurel_rank": 16},
        **{"activation_sparsity_pattern": [0.0] * 4, "hidden_size_per_layer_input": 32, "altup_num_inputs": 2},
        **{"altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_active_idx": 0},
        **{"rope_local_base_freq": 10000.0, "final_logit_softcapping": 30.0},
    },
    "gemma4": {"model_type": "gemma4_text"},
    "kimi_k25": {"model_type": "deepseek_v3"},
    "kimi_k3": {"model_type": "kimi_linear", "num_experts_per_token": 2},
    "kimi_vl": {"model_type": "deepseek_v3"},
    "lfm2-vl": {"model_type": "lfm2"},
    "llama4": {
        "attention_chunk_size": 64,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "rope_scaling": None,
        "use_qk_norm": False,
        "no_rope_layers": [1, 1, 1, 0],
    },
    "minimax_m3_vl": {},
    "mistral3": {"model_type": "llama"},
    "muse_spark": {},
    "pixtral": {"model_type": "llama"},
    "prism_hadamard_qwen35": {},
    "qwen2_vl": {"model_type": "qwen2"},
    "qwen3_5": {"num_experts": 0},
    "qwen3_5_moe": {},
    "qwen3_vl": {"model_type": "qwen3"},
    "qwen3_vl_moe": {"model_type": "qwen3_moe"},
}
"""Architectures around a text model, and what the text model needs besides what its own architecture does."""


def names() -> list[str]:
    """The architectures, by module."""
    return [m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__)]


def build(name: str, **changes: Any) -> Any:
    """A model of random, unevaluated weights; None where the module holds no model.

    Raises:
        Exception: what the architecture says of arguments that do not suit it.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            module = importlib.import_module(f"mlx_lm.models.{name}")
    except SystemExit:  # olmo ends the process where its package is missing
        return None
    kind = getattr(module, "ModelArgs", None)
    if kind is None or not hasattr(module, "Model"):
        return None
    given = {"model_type": name, **GENERIC, **FAMILIES.get(name, {}), **changes}
    if name in WRAPPED:
        inner = WRAPPED[name]
        given["text_config"] = {**given, **FAMILIES.get(inner.get("model_type", ""), {}), **inner}
    required = {k for k, p in inspect.signature(kind).parameters.items() if p.default is inspect.Parameter.empty}
    assert required <= given.keys(), (name, required - given.keys())
    made = module.Model(kind.from_dict({k: given[k] for k in inspect.signature(kind).parameters if k in given}))
    made.eval()
    return made


KINDS = ("packed", "own caches", "refused", "not run")


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture.

    Attributes:
        kind: "packed", "refused", "own caches" (nothing to pack), or "not run".
        what: the layers that are packed, the sentence of the refusal, or why it was not run.
        error: of packed layers, the largest difference of log-probabilities to stock layers of decoded values, in nats.
    """

    kind: str
    what: str
    error: float = 0.0


def outcome(name: str) -> Outcome | None:
    """Builds a model with random weights, asks for a packed cache, and if there is one reads 150 tokens and 3 single
    ones into it and into mlx-lm's own cache of decoded values. None where the module holds no model."""
    try:
        made = build(name)
        if made is None:
            return None
        made(mx.zeros((1, 2), dtype=mx.int32), cache=stock.make_prompt_cache(made))
    except Exception as error:
        return Outcome("not run", f"{type(error).__name__}: {error}".partition("\n")[0])
    mx.random.seed(0)
    made.update(
        tree_map(lambda p: weights(p, mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p, made.parameters())
    )
    try:
        cache = forge.make_prompt_cache(made, SPEC, fitted=False)
    except ValueError as error:
        return Outcome(*refusal(error))
    with forge.patched(), _without_rounding(name):
        found, wanted = (_logs(made, x) for x in (cache, slow_prompt_cache(made)))
    told = forge.report(cache)
    return Outcome("packed", f"{told['packed']} of {told['of']}", float(np.abs(found - wanted).max()))


@contextlib.contextmanager
def _without_rounding(name: str) -> Iterator[None]:
    """afm7 rounds its keys and values to 8 bits, which makes whole steps of differences in the last bit of a float and
    hides what is measured here; it does not meanwhile."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    rounding = getattr(module, "fake_8bit_quant", None)
    if rounding is not None:
        module.fake_8bit_quant = lambda x, scale: x
    try:
        yield
    finally:
        if rounding is not None:
            module.fake_8bit_quant = rounding


def refusal(error: ValueError) -> list[str]:
    """Kind and text of what `make_prompt_cache` says."""
    prefix, text = "[mlx_lm] ", str(error)
    assert text.startswith(prefix), text
    kind = "own caches" if "expected a full-attention layer" in text else "refused"
    return [kind, text.removeprefix(prefix)]


def _random(p: mx.array) -> mx.array:
    return weights(p, mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p


def _logs(made: Any, cache: list[Any]) -> Any:
    """Log-probabilities after a prompt of two pieces and after single tokens, [4, vocabulary]."""
    ids, out = np.random.default_rng(0).integers(1, 97, 153).tolist(), []
    for first, last in ((0, 100), (100, 150), (150, 151), (151, 152), (152, 153)):
        logits = made(mx.array([ids[first:last]]), cache=cache)[0, -1].astype(mx.float32)
        out.append(np.array(logits - mx.logsumexp(logits)))
    return np.stack(out[1:])


def main() -> None:
    print("# Architectures of mlx-lm with packed caches\n")
    print(
        f"mlx-lm {version('mlx-lm')}, MLX {version('mlx')}. Every architecture was built tiny, with random weights,\n"
        "and run on the CPU. The last column is the largest difference of a log-probability, in nats,\n"
        "of a packed cache to mlx-lm's own cache over the same decoded values; experts chosen by a hair\n"
        "make it larger. afm7 rounds its keys to 8 bits itself, which would do the same, and is measured\n"
        "without that rounding. A refusal comes from `make_prompt_cache`, before a prompt is read.\n"
        "`tests/mlx_families.py` writes this page.\n"
    )
    rows = []
    for name in names():
        if (found := outcome(name)) is not None:
            rows.append((name, found))
            print(name, found.kind, f"{found.error:.1e}", file=sys.stderr, flush=True)
    kinds = {kind: sum(found.kind == kind for _, found in rows) for kind in KINDS}
    print(", ".join(f"{count} {kind}" for kind, count in kinds.items()) + ".\n")
    print("| architecture | outcome | layers, or why | error |\n|---|---|---|---|")
    for name, found in rows:
        error = f"{found.error:.1e}" if found.kind == "packed" else ""
        print(f"| {name} | {found.kind} | {found.what.replace('|', '/')} | {error} |")


if __name__ == "__main__":
    main()
