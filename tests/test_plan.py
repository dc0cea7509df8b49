"""Plans against what caches really hold, for every kind of layer, and against the arithmetic of a user."""

import argparse
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from forgeattention import CodecSpec
from forgeattention.codec.presets import PRESETS
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.tools import plan
from forgeattention.tools.evaluation.memory import cache_bytes

SMALL = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64,
         "max_position_embeddings": 4096, "dtype": "float32", "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
DELTA = {"num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
         "linear_value_head_dim": 16}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"
FAMILIES = {
    "llama": ({"num_hidden_layers": 2}, {"full"}),
    "phi3": ({"num_hidden_layers": 2}, {"full"}),
    "mistral": ({"num_hidden_layers": 2, "sliding_window": 40}, {"sliding"}),
    "gemma3_text": ({"num_hidden_layers": 3, "sliding_window": 40, "layer_types": [SLIDING, SLIDING, FULL]},
                    {"sliding", "full"}),
    "gemma4_text": ({"num_hidden_layers": 4, "sliding_window": 40, "num_kv_shared_layers": 2, "global_head_dim": 128,
                     "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
                     "layer_types": [SLIDING, FULL, SLIDING, FULL]}, {"sliding", "full", "shared"}),
    "gpt_oss": ({"num_hidden_layers": 2, "sliding_window": 40, "num_local_experts": 4, "num_experts_per_tok": 2},
                {"sliding", "full"}),
    "qwen3_next": ({**DELTA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                    "shared_expert_intermediate_size": 32}, {"state", "full"}),
    "qwen3_5_text": (DELTA, {"state", "full"}),
    "lfm2": ({"num_hidden_layers": 3, "layer_types": ["conv", FULL, "conv"]}, {"state", "full"}),
    "granitemoehybrid": ({"num_hidden_layers": 2, "layer_types": ["mamba", "attention"], "mamba_n_heads": 8,
                          "mamba_d_head": 16, "mamba_expand": 2, "num_local_experts": 0}, {"state", "full"}),
    "falcon_h1": ({"num_hidden_layers": 2, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16,
                   "mamba_d_state": 16}, {"hybrid"}),
}  # fmt: skip


def config_of(family):
    return AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family][0]})


def filled(model, cache, tokens):
    """A cache after reading in blocks and one step of decoding, as when a model generates."""
    ids = torch.randint(3, 64, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for block in (*ids[:, :-1].split(256, 1), ids[:, -1:]):
            model(block, past_key_values=cache, use_cache=True)
    return cache_bytes(cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_caches_hold_what_the_plan_says(family):
    config = config_of(family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    made = plan.inspect(config)
    assert {layer.kind for layer in made.layers} == FAMILIES[family][1]
    assert made.parameters == sum(p.numel() for p in model.parameters())
    assert made.weight_bytes == sum(p.nbytes for p in model.parameters())
    for tokens in (30, 600):
        assert made.exact_bytes(tokens) == pytest.approx(filled(model, DynamicCache(config=config), tokens), rel=0.02)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma4_text", "qwen3_next", "gpt_oss"])
@pytest.mark.parametrize("spec", [CodecSpec(), CodecSpec(k_bits=2, v_bits=4, sinks=0, window=64)])
def test_packed_caches_hold_what_the_plan_says(family, spec):
    config = config_of(family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="forge").eval()
    made = plan.inspect(config)
    for tokens in (100, 2000):
        held = filled(model, ForgeCache(config, spec), tokens)
        assert made.packed_bytes(tokens, spec) == pytest.approx(held, rel=0.02)


def test_the_longest_context_is_the_longest():
    made = plan.inspect(config_of("gemma3_text"))
    for memory in (5_000_000, 50_000_000):
        for count in (made.exact_bytes, lambda n: made.packed_bytes(n, CodecSpec())):
            best = plan.longest(made, memory, count)
            used = made.weight_bytes + made.working_bytes()
            assert best > 0
            assert used + count(best) <= memory < used + count(best + 64)
    assert plan.longest(made, 1000, made.exact_bytes) == 0
    sliding = plan.inspect(config_of("mistral"))
    assert plan.longest(sliding, 10**8, sliding.exact_bytes) is None


def test_fewer_bits_give_longer_contexts_and_the_known_bytes_per_token():
    made = plan.inspect(config_of("llama"))
    rows = {row.cache: row for row in plan.rows(made, 10**9, PRESETS)}
    contexts = [rows[name].context for name in ("exact", *plan.AFFINE_BITS)]
    assert contexts == sorted(contexts)
    elements = 2 * 2 * 2 * 64
    assert rows["exact"].bytes_per_token == 4 * elements
    assert rows["4-bit (affine, groups of 64)"].bytes_per_token == 4.5 / 8 * elements
    for name, spec in PRESETS.items():
        bits = spec.page_format(64).effective_bits
        assert rows[name].bytes_per_token == pytest.approx(bits / 8 * elements + 2 * 8 / 64, rel=1e-3)


def test_quantized_weights_count_at_their_width():
    config = config_of("llama")
    exact = plan.inspect(config)
    assert plan.inspect(config, weight_bits=4).weight_bytes == pytest.approx(exact.weight_bytes / 8, rel=0.02)
    config.quantization = {"bits": 4, "group_size": 64}
    assert plan.inspect(config).weight_bytes == plan.inspect(config_of("llama"), weight_bits=4.5).weight_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GB", 16 * 10**9), ("16 GiB", 16 * 2**30), ("512mb", 512 * 10**6), ("1.5TB", 1_500 * 10**9), ("1000", 1000)],
)
def test_memory_sizes(text, size):
    assert plan.parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "16 apples", "-1GB", "1e9"])
def test_wrong_memory_sizes_are_refused(text):
    with pytest.raises(ValueError, match=r"^\[plan\] expected a memory size such as 16GB or 16GiB; got"):
        plan.parse_memory(text)


def test_a_config_file_alone_is_enough(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_of("qwen3_next").to_dict()))
    options = dict.fromkeys(("memory", "weight_bits", "preset", "k_bits", "v_bits", "engine"))
    args = argparse.Namespace(model=str(file), **options)
    result = plan.run(args)
    assert {"Apple 16 GB", "NVIDIA 80 GB"} <= set(result["machines"])
    assert [row["cache"] for row in result["machines"]["Apple 16 GB"]] == ["exact", *plan.AFFINE_BITS, *PRESETS]
    assert "3 state, 1 full" in capsys.readouterr().out
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("content", ["[]", '{"hidden_size": 3}'])
def test_another_json_file_is_refused(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"^\[plan\] expected a config.json with model_type; got"):
        plan.read_config(str(file))


def test_layers_that_the_plan_does_not_know_are_named():
    config = AutoConfig.for_model("deepseek_v3", **{**SMALL, "num_hidden_layers": 1, "first_k_dense_replace": 1})
    with pytest.raises(ValueError, match=r"^\[plan\] expected layer 0 to project keys and values by head; got"):
        plan.inspect(config)


def test_a_machine_is_the_share_that_a_model_may_use() -> None:
    table = plan.machine_sizes()
    assert plan.memory_of("apple 16GB") == {"Apple 16 GB": table["Apple 16 GB"]} == {"Apple 16 GB": 10_560_000_000}
    assert plan.memory_of("NVIDIA 24 GB") == {"NVIDIA 24 GB": table["NVIDIA 24 GB"]}
    assert plan.memory_of("16GB") == {"16GB": 16 * 10**9}
    with pytest.raises(ValueError, match=r"\[plan\] expected a memory size"):
        plan.memory_of("apple")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "falcon_h1"])
def test_mlx_lays_a_model_out_as_transformers_does(family: str) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    from forgeattention.models import shape_mlx

    theirs = plan.inspect(config_of(family))
    ours = shape_mlx.inspect({**config_of(family).to_dict(), "sliding_window_pattern": 3})
    assert [(x.kind, x.kv_heads, x.k_dim, x.v_dim) for x in ours.layers] == [
        (x.kind, x.kv_heads, x.k_dim, x.v_dim) for x in theirs.layers
    ]
    assert ours.parameters == pytest.approx(theirs.parameters, rel=0.02)
    fields = {**config_of(family).to_dict(), "sliding_window_pattern": 3, "dtype": "bfloat16"}
    quarter = shape_mlx.inspect({**fields, "quantization": {"bits": 4, "group_size": 64}})
    assert quarter.weight_bytes == pytest.approx(quarter.parameters * 4.5 / 8, rel=0.05)
    spec = CodecSpec()
    assert ours.packed_bytes(5000, spec) == pytest.approx(theirs.packed_bytes(5000, spec), rel=0.05)
