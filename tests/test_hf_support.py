"""Models whose attention "forge" cannot compute are refused, with a ForgeCache and without."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from families import config_of
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from forgeattention.integrations.hf.cache import ForgeCache

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "n_head": 4, "n_embd": 64, "n_layer": 2, "rotary_dim": 8, "d_model": 64, "ffn_dim": 64,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "num_layers": 2, "is_decoder": True,
    "embedding_size": 64, "input_embedding_size": 64, "output_embedding_size": 64, "attention_heads": 4,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
OWN_CODE = (
    "bloom", "codegen", "xglm", "gpt_neox_japanese", "megatron-bert", "rembert", "roformer", "mvp", "trocr", "big_bird",
    "bigbird_pegasus",
)  # fmt: skip
EAGER_ONLY = {
    "deepseek_v4": {
        "head_dim": 64, "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 32,
        "o_lora_rank": 32, "o_groups": 2, "index_n_heads": 2, "index_head_dim": 32, "qk_rope_head_dim": 16,
        "num_hash_layers": 0,
    },
    "inkling2_text": {
        "head_dim": 64, "moe_intermediate_size": 64, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "d_rel": 8, "rel_extent": 32,
    },
}  # fmt: skip


def made(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="forge").eval()


@pytest.mark.parametrize("kind", [*OWN_CODE, *EAGER_ONLY])
def test_refused_when_the_cache_is_made_and_without_a_cache(kind: str) -> None:
    built = made(kind, **EAGER_ONLY.get(kind, {}))
    why = "which computes attention in its own code|whose attention only its own eager code computes"
    for what in (built, built.config):
        with pytest.raises(ValueError, match=rf"\[forge_cache\] expected .* can be exchanged; got \w+, ({why})"):
            ForgeCache(what)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=rf"\[forge\] expected .* exchanged; got \w+, ({why}): load it"),
    ):
        built(torch.arange(1, 20)[None], use_cache=False)


OWN_READING = {"doge": ".transpose|.shape", "jetmoe": ".repeat", "diffllama": "values by torch.chunk"}


@pytest.mark.parametrize("kind", OWN_READING)
def test_models_that_read_keys_themselves_are_given_decoded_ones(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    built = made(kind, head_dim=64, kv_channels=64)
    for what in (built, built.config):
        caplog.clear()
        assert ForgeCache(what).report()["decoded"] == 2
        said = [text for text in caplog.messages if "by decoding them at every step" in text]
        assert len(said) == 1
        assert re.search(rf"got \w+Attention, which reads their ({OWN_READING[kind]})", said[0])


@pytest.mark.parametrize("kind", ["rwkv", "xlstm", "openai-gpt", "xlnet"])
def test_models_that_read_no_keys_from_a_cache_are_refused(kind: str) -> None:
    config = config_of(next(k for k in MODEL_FOR_CAUSAL_LM_MAPPING if k.model_type == kind))
    built = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"\[forge_cache\] expected a model that reads its keys from a cache; got \w+"):
        ForgeCache(built)


def test_keys_that_an_indexer_chose_are_all_that_a_stock_layer_sees() -> None:
    """The class folds the choice into its mask only for "eager" and "sdpa", by name."""
    kind = next(k for k in MODEL_FOR_CAUSAL_LM_MAPPING if k.model_type == "deepseek_v32")
    logits = []
    for implementation, chosen in (("eager", 16), ("forge", 16), ("forge", 512)):
        torch.manual_seed(0)
        config = config_of(kind, index_topk=chosen)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
        with torch.no_grad():
            logits.append(model(torch.arange(3, 90)[None], use_cache=False).logits)
    assert (logits[1] - logits[0]).abs().max() < 1e-4 * logits[0].abs().max()
    assert (logits[2] - logits[0]).abs().max() > 1e-2 * logits[0].abs().max()


@pytest.mark.parametrize("kind", ["falcon", "gptj", "gpt_neo"])
def test_models_with_a_table_of_attention_classes_are_refused_by_name(kind: str) -> None:
    with pytest.raises(
        ValueError, match=rf"\[forge\] expected .* exchanged; got {kind}, which has attention classes of"
    ):
        made(kind, **({"attention_types": [[["global"], 2]]} if kind == "gpt_neo" else {}))
