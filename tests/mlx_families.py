"""Tiny models of every architecture that mlx-lm has: one value for each argument, the same for all but where a family
needs another."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import pkgutil
from typing import Any

import mlx_lm.models

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
    "baichuan_m1": {"conv_window": 2, "sliding_window_layers": [0, 2]},
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
    "hunyuan": {"cla_share_factor": 2, "use_cla": True, "use_mixed_mlp_moe": True},
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
NESTED = {
    **dict.fromkeys(("gemma3", "lfm2-vl", "llama4", "mistral3", "pixtral", "qwen2_vl", "qwen3_vl"), "text_config"),
}
"""Wrappers around another architecture, by the argument that holds its configuration."""


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
    required = {k for k, p in inspect.signature(kind).parameters.items() if p.default is inspect.Parameter.empty}
    given = {k: v for k, v in given.items() if k in inspect.signature(kind).parameters}
    assert required <= given.keys(), (name, required - given.keys())
    made = module.Model(kind.from_dict(given))
    made.eval()
    return made
