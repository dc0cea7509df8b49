"""The packed cache inside vLLM against vLLM's own cache."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from vllm import SamplingParams

from forgeattention import models
from forgeattention.integrations import vllm as plugin
from forgeattention.integrations.vllm.backend import PackedBackend
from forgeattention.integrations.vllm.settings import Settings
from forgeattention.models.weights.hf import weight_codecs
from tests.tolerances import VLLM
from tests.vllm_engine.compare import divergence, logprobs

GREEDY = SamplingParams(temperature=0, max_tokens=24)


def hits(llm: Any) -> float:
    (metric,) = [m for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits"]
    return metric.value


def capacity(llm: Any) -> int:
    """Tokens of KV blocks in the pool: blocks times the tokens of a block of full attention."""
    core = llm.llm_engine.engine_core.engine_core
    groups = core.scheduler.kv_cache_config.kv_cache_groups
    return core.scheduler.kv_cache_config.num_blocks * groups[0].kv_cache_spec.block_size


def test_predictions_prefix_hits_and_capacity_beside_the_default_cache(
    smollm2: str, text: str, engine: Callable[..., Any]
) -> None:
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 256}
    stock = engine(smollm2, None, **options)
    ids = stock.get_tokenizer()(text).input_ids[:1024]
    exact = logprobs(stock, ids)
    prompts = ["The capital of France is", "The opposite of hot is"]
    answers = [o.outputs[0].text for o in stock.generate(prompts, GREEDY, use_tqdm=False)]
    float32_tokens = capacity(stock)

    llm = engine(smollm2, {}, **options)
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    assert {x.get_attn_backend().__name__ for x in layers.values()} == {"PackedBackend", "ExactBackend"}
    hf, _ = models.load(smollm2)
    for number, codec in weight_codecs(hf, Settings().spec, range(30)).items():
        assert layers[f"model.layers.{number}.self_attn.attn"].impl.codec.fingerprint == codec.fingerprint
    del hf
    kl, same = divergence(exact, logprobs(llm, ids))
    assert kl < VLLM["kl"]
    assert same > VLLM["same_top"]
    # Short prompts are not packed at all.
    assert [o.outputs[0].text for o in llm.generate(prompts, GREEDY, use_tqdm=False)] == answers
    # FP16 blocks hold half the bytes of float32 ones.
    assert capacity(llm) >= 4.6 * 2 * float32_tokens

    tokens = [{"prompt_token_ids": [*ids[:900], *ids[5:40]]}]
    ask = SamplingParams(temperature=0, max_tokens=8, logprobs=5)
    cold = llm.generate(tokens, ask, use_tqdm=False)[0]
    before = hits(llm)
    warm = llm.generate(tokens, ask, use_tqdm=False)[0]
    assert hits(llm) - before == warm.num_cached_tokens == 896
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids
    said = [[{k: v.logprob for k, v in d.items()} for d in o.outputs[0].logprobs] for o in (cold, warm)]
    assert divergence(*said)[0] < VLLM["kl"]


def test_an_exhausted_pool_preempts_and_recovers(llama: Callable[..., str], engine: Callable[..., Any]) -> None:
    limits = {"num_gpu_blocks_override": 110, "max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": 768}
    llm = engine(llama(), {}, skip_tokenizer_init=True, **limits)
    ids = [[(7 * i + 13 * j) % 500 + 3 for j in range(20)] for i in range(8)]
    ask = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, detokenize=False)
    alone = llm.generate([{"prompt_token_ids": ids[0]}], ask, use_tqdm=False)[0].outputs[0].token_ids
    outs = llm.generate([{"prompt_token_ids": x} for x in ids], ask, use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outs] == [200] * 8
    (preempted,) = [m for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    assert preempted.value > 0
    llm.reset_prefix_cache()
    again = llm.generate([{"prompt_token_ids": ids[0]}], ask, use_tqdm=False)[0].outputs[0].token_ids
    assert again == alone
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == 109


def test_a_kv_cache_dtype_names_a_preset(llama: Callable[..., str], engine: Callable[..., Any]) -> None:
    """From vLLM 0.33 on, which lets backends name dtypes; before, the name is refused."""
    import vllm

    options: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 768, "kv_cache_dtype": "forge4"}
    if vllm.__version__.startswith("0.32."):
        with pytest.raises(ValueError, match="forge4"):
            engine(llama(), {}, **options)
        return
    llm = engine(llama(), {}, **options)
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    assert {x.impl.settings.preset for x in layers.values()} == {"fidelity"}
    ask = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, detokenize=False)
    assert len(llm.generate([{"prompt_token_ids": list(range(3, 200))}], ask, use_tqdm=False)[0].outputs[0].token_ids)
    with pytest.raises(ValueError, match="expected preset"):
        engine(llama(), {"preset": "small"}, **options)


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    return done.stdout + done.stderr


TP = """
import sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    ids = [[(11 * i + 5 * j) % 500 + 3 for j in range(400)] for i in range(3)]
    options = {{"attention_backend": "CUSTOM", "additional_config": {{"forgeattention": {{}}}}}}
    llm = LLM(model={model!r}, dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=4,
              max_num_batched_tokens=256, tensor_parallel_size={ranks}, skip_tokenizer_init=True, **options)
    ask = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, detokenize=False)
    outs = llm.generate([{{"prompt_token_ids": x}} for x in ids], ask, use_tqdm=False)
    print("TOKENS", [o.outputs[0].token_ids for o in outs])
"""


def test_two_ranks_give_the_tokens_of_one(llama: Callable[..., str], tmp_path: Any) -> None:
    model, said = llama(), []
    for ranks in (1, 2):
        script = tmp_path / f"tp{ranks}.py"
        script.write_text(TP.format(model=model, ranks=ranks))
        done = subprocess.run(
            [sys.executable, str(script)],
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        said.append([line for line in done.stdout.splitlines() if line.startswith("TOKENS")])
        assert said[-1], done.stderr[-3000:]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 40}, {}, "head_size not supported"),
        ({}, {"block_size": 96}, "block_size not supported"),
        ({}, {"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({}, {"additional_config": {"forgeattention": {"bits": 3}}}, "expected settings among"),
        ({}, {"attention_backend": None}, "expected --attention-backend CUSTOM"),
        ({}, {"disable_hybrid_kv_cache_manager": True}, "expected the hybrid KV cache manager"),
    ],
)
def test_what_is_not_supported_is_refused(
    llama: Callable[..., str], engine: Callable[..., Any], changes: dict, options: dict, message: str
) -> None:
    with pytest.raises(Exception, match=message):
        engine(llama(**changes), {}, skip_tokenizer_init=True, **options)


def test_another_platform_is_no_silent_fallback(llama: Callable[..., str]) -> None:
    code = f"""
from vllm import LLM
LLM(model={llama()!r}, attention_backend="CUSTOM", skip_tokenizer_init=True, enforce_eager=True)
"""
    assert "expected forgeattention's CPU platform" in run(code, VLLM_TARGET_DEVICE="cpu")


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    plugin.check_version()
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    with pytest.raises(ValueError, match="which this backend was tested with"):
        plugin.check_version()


def test_the_backend_stands_under_its_name() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    plugin.register()
    plugin.register()
    assert AttentionBackendEnum.CUSTOM.get_class() is PackedBackend
