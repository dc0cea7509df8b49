"""Decode steps over static buffers, as a CUDA graph replays them. Without a GPU the step itself runs again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_slow import model

from forgeattention import CodecSpec
from forgeattention.backends.cuda import nvrtc
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.integrations.hf.graph import DecodeGraph

SPEC = CodecSpec(k_bits=3, v_bits=3, sinks=3, window=12)
NEW = 95
available, reason = nvrtc.available()


class Rerun(DecodeGraph):
    """A graph that only repeats the step."""

    def _check_device(self, model: Any) -> None:
        pass

    def _record(self) -> Callable[[], None]:
        self._run()
        self._rewind()
        return self._run


def prompt(rows: int = 2, n: int = 50, pad: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids, mask = torch.randint(1, 97, (rows, n)), torch.ones(rows, n, dtype=torch.long)
    mask[-1, :pad] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.fixture(scope="module")
def llama() -> Any:
    return model()


def both(llama: Any, inputs: dict[str, Any], graph: type[DecodeGraph], **options: Any) -> tuple[Any, Any, Any, Any]:
    """Tokens and caches without and with a graph."""
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    plain, replayed = ForgeCache(llama.config, SPEC), ForgeCache(llama.config, SPEC)
    want = llama.generate(**inputs, past_key_values=plain, **options)
    with graph(llama, replayed, max_length=400) as steps:
        got = llama.generate(**inputs, past_key_values=replayed, **options)
    assert steps.replays == NEW - 1
    assert steps.eager == 1
    return want, got, plain, replayed


@pytest.mark.parametrize(("rows", "pad"), [(1, 0), (2, 17)])
def test_the_tokens_and_the_cache_are_those_of_plain_steps(llama: Any, rows: int, pad: int) -> None:
    want, got, plain, replayed = both(llama, prompt(rows, pad=pad), Rerun)
    assert want.tolist() == got.tolist()
    for a, b in zip(plain.layers, replayed.layers, strict=True):
        assert a.cache.lengths.tolist() == b.cache.lengths.tolist()
        assert a.cache.packed_lengths.tolist() == b.cache.packed_lengths.tolist()
        assert b.cache.packed_lengths.min() >= 64
        assert a.seen == b.seen
        for row in range(rows):
            pages = [torch.stack([c.pool.page(p) for p in c.row_pages(row).tolist()]) for c in (a.cache, b.cache)]
            assert torch.equal(*pages)
    assert replayed.get_seq_length() == plain.get_seq_length()


def test_the_model_and_the_cache_work_on_afterwards(llama: Any) -> None:
    inputs = prompt(1)
    want, _, plain, replayed = both(llama, inputs, Rerun)
    assert "forward" not in vars(llama)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    more = [llama.generate(input_ids=want, past_key_values=cache, **options).tolist() for cache in (plain, replayed)]
    assert more[0] == more[1]


def test_other_calls_run_eagerly(llama: Any) -> None:
    cache = ForgeCache(llama.config, SPEC)
    ids = prompt(1)["input_ids"]
    with Rerun(llama, cache, max_length=400) as steps:
        llama(input_ids=ids, past_key_values=cache)
        llama(input_ids=ids[:, :1], past_key_values=ForgeCache(llama.config, SPEC))
        llama(input_ids=ids[:, :2], past_key_values=cache)
        llama(ids[:, :1], past_key_values=cache, output_hidden_states=True)
        llama(ids[:, :1], past_key_values=cache, attention_mask=torch.tensor([[1] * 53 + [0]]))
        assert (steps.replays, steps.eager) == (0, 5)
        llama(ids[:, :1], past_key_values=cache, return_dict=True)
        assert (steps.replays, steps.eager) == (1, 5)


def test_rows_that_leave_are_captured_anew(llama: Any) -> None:
    caches = [ForgeCache(llama.config, SPEC) for _ in range(2)]
    inputs = prompt(3)
    logits = []
    for cache in caches:
        llama(**inputs, past_key_values=cache)
        with Rerun(llama, cache, max_length=400) as steps:
            run = llama if cache is caches[1] else steps.forward
            for _ in range(3):
                run(input_ids=inputs["input_ids"][:, :1], past_key_values=cache, use_cache=True)
            cache.reorder_cache(torch.tensor([2, 0]))
            for _ in range(70):
                out = run(input_ids=inputs["input_ids"][:2, :1], past_key_values=cache, use_cache=True)
            logits.append(out.logits)
    assert torch.equal(*logits)


def test_a_full_table_is_an_error_and_changes_nothing(llama: Any) -> None:
    cache = ForgeCache(llama.config, SPEC)
    inputs = prompt(1, n=80)
    llama(**inputs, past_key_values=cache)
    step = {"input_ids": inputs["input_ids"][:, :1], "past_key_values": cache}
    with Rerun(llama, cache, max_length=64) as steps:
        for _ in range(62):
            llama(**step)
        held = cache.layers[0].cache.lengths.tolist()
        with pytest.raises(ValueError, match="at most 64 packed tokens"):
            llama(**step)
        assert cache.layers[0].cache.lengths.tolist() == held
        assert steps.replays == cache.get_seq_length() - 80
    llama(**step)


def test_refusals(llama: Any) -> None:
    with pytest.raises(ValueError, match=r"\[decode_graph\] expected a model on a CUDA device; got cpu"):
        DecodeGraph(llama, ForgeCache(llama.config, SPEC), max_length=100)
    cache = ForgeCache(llama.config, SPEC, exact_layers=[1])
    with pytest.raises(ValueError, match=r"expected packed layers only; got stock caches in layers \[1\]"):
        Rerun(llama, cache, max_length=100)


@pytest.mark.skipif(not available, reason=reason)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "pad"), [(1, 0), (3, 17)])
def test_replayed_graphs_give_the_tokens_of_plain_steps(rows: int, pad: int, dtype: torch.dtype) -> None:
    made = model().to("cuda", dtype)
    inputs = {name: x.cuda() for name, x in prompt(rows, pad=pad).items()}
    want, got, _, _ = both(made, inputs, DecodeGraph)
    assert want.tolist() == got.tolist()
