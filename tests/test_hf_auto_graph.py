"""Caches that replay graphs of a model's decode steps by themselves. Without a GPU the step itself runs again."""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hf_slow import model

from forgeattention import CodecSpec
from forgeattention.backends import cuda
from forgeattention.integrations.hf import auto_graph
from forgeattention.integrations.hf.cache import ForgeCache

SPEC = CodecSpec(k_bits=3, v_bits=3, sinks=3, window=12)
NEW = 95
available, reason = cuda.available()


@pytest.fixture(scope="module")
def llama() -> Any:
    return model()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps that are run again where a graph would be replayed."""

    def record(self: auto_graph.AutoGraph) -> Callable[[], None]:
        self._run()
        self._rewind()
        return self._run

    monkeypatch.setattr(auto_graph.AutoGraph, "_record", record)
    monkeypatch.setattr(auto_graph.AutoGraph, "_check_device", lambda self, model: None)
    monkeypatch.setattr(auto_graph, "unfit", lambda model, cache: auto_graph.refusal(cache))
    yield
    gc.collect()


def prompt(rows: int, pad: int = 0, n: int = 50, device: str = "cpu") -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids, mask = torch.randint(1, 97, (rows, n)), torch.ones(rows, n, dtype=torch.long)
    mask[-1, :pad] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0).to(device), "attention_mask": mask.to(device)}


def same_pages(a: ForgeCache, b: ForgeCache) -> None:
    for x, y in zip(a.layers, b.layers, strict=True):
        assert x.cache.lengths.tolist() == y.cache.lengths.tolist()
        for row in range(x.cache.batch):
            pages = [[c.pool.page(p).cpu().numpy().tobytes() for p in c.row_pages(row)] for c in (x.cache, y.cache)]
            assert pages[0] == pages[1]


@pytest.mark.parametrize(("rows", "pad"), [(1, 0), (2, 17)])
def test_generate_replays_by_itself(llama: Any, on_cpu: None, rows: int, pad: int) -> None:
    inputs, options = prompt(rows, pad), {"max_new_tokens": NEW, "do_sample": False}
    plain, ours = ForgeCache(llama, SPEC), ForgeCache(llama, SPEC, graph=True)
    want = llama.generate(**inputs, past_key_values=plain, **options)
    assert ours.graph().replays == 0
    got = llama.generate(**inputs, past_key_values=ours, **options)
    assert want.tolist() == got.tolist()
    assert ours.graph().replays == NEW - 1 - auto_graph.PATIENCE
    same_pages(plain, ours)
    # A second turn: a prompt behind what was generated, then steps again.
    more = torch.cat([got, inputs["input_ids"]], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(rows, more.shape[1] - 50, dtype=torch.long)], 1)
    turns = [llama.generate(more, attention_mask=mask, past_key_values=c, **options).tolist() for c in (plain, ours)]
    assert turns[0] == turns[1]
    same_pages(plain, ours)


def test_the_model_is_as_it_was_once_the_cache_is_gone(llama: Any, on_cpu: None) -> None:
    assert "forward" not in vars(llama)
    signature = inspect.signature(llama.forward)
    caches = [ForgeCache(llama, SPEC, graph=True) for _ in range(2)]
    assert inspect.signature(llama.forward) == signature
    llama.generate(**prompt(1), past_key_values=caches[0], max_new_tokens=20)
    pools = [layer.cache.pool for layer in caches[0].layers]
    assert caches[0].graph().replays > 0
    copied = copy.deepcopy(llama)
    assert copied.forward.__self__ is copied
    caches.pop()
    assert "forward" in vars(llama)
    caches.pop()
    assert "forward" not in vars(llama)
    assert [pool.in_use for pool in pools] == [0] * len(pools), "without a garbage collection"


def test_rows_that_change_and_other_calls_run_without(llama: Any, on_cpu: None) -> None:
    caches = [ForgeCache(llama, SPEC), ForgeCache(llama, SPEC, graph=True)]
    inputs, logits = prompt(3), []
    with torch.no_grad():
        for cache in caches:
            llama(**inputs, past_key_values=cache)
            for size in (3, 2):
                for _ in range(40):
                    out = llama(input_ids=inputs["input_ids"][:size, :1], past_key_values=cache, use_cache=True)
                cache.reorder_cache(torch.tensor([size - 1, 0]))
            cache.crop(-30)
            for _ in range(30):
                out = llama(input_ids=inputs["input_ids"][:2, :1], past_key_values=cache, use_cache=True)
            logits.append(out.logits)
        graph = caches[1].graph()
        assert graph.replays == 40 + 40 + 30 - 3 * auto_graph.PATIENCE
        before = graph.replays
        llama(inputs["input_ids"][:2, :1], past_key_values=caches[1], output_hidden_states=True)
        hook = llama.model.layers[0].register_forward_hook(lambda *a: None)
        for _ in range(12):
            llama(input_ids=inputs["input_ids"][:2, :1], past_key_values=caches[1])
        hook.remove()
        assert graph.replays == before
    assert torch.equal(*logits)


def test_weights_that_moved_are_captured_anew(on_cpu: None) -> None:
    llama = model()
    caches = [ForgeCache(llama, SPEC), ForgeCache(llama, SPEC, graph=True)]
    outs = []
    with torch.no_grad():
        for cache in caches:
            llama(**prompt(1), past_key_values=cache)
            for _ in range(12):
                llama(input_ids=torch.tensor([[5]]), past_key_values=cache)
        llama.lm_head.weight.data = llama.lm_head.weight.data.clone() * 2
        before = caches[1].graph().replays
        outs = [llama(input_ids=torch.tensor([[5]]), past_key_values=cache).logits for cache in caches]
    assert caches[1].graph().replays == before
    assert torch.equal(*outs)


def test_a_module_put_around_another_is_captured_anew(on_cpu: None) -> None:
    """As adapters are put into a model that has decoded already: its old weights stay where they were."""

    class Twice(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    llama = model()
    caches = [ForgeCache(llama, SPEC), ForgeCache(llama, SPEC, graph=True)]
    with torch.no_grad():
        for cache in caches:
            llama(**prompt(1), past_key_values=cache)
            for _ in range(12):
                llama(input_ids=torch.tensor([[5]]), past_key_values=cache)
        before = caches[1].graph().replays
        assert before
        llama.model.layers[0].mlp.down_proj = Twice(llama.model.layers[0].mlp.down_proj)
        outs = [llama(input_ids=torch.tensor([[5]]), past_key_values=cache).logits for cache in caches]
    assert caches[1].graph().replays == before
    assert torch.equal(*outs)


def test_a_step_that_cannot_be_captured_runs_without(
    llama: Any, on_cpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Any) -> None:
        self._run()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(auto_graph.AutoGraph, "_record", fail)
    options = {"max_new_tokens": 30, "do_sample": False}
    plain, ours = ForgeCache(llama, SPEC), ForgeCache(llama, SPEC, graph=True)
    tokens = [llama.generate(**prompt(2, 9), past_key_values=c, **options).tolist() for c in (plain, ours)]
    assert tokens[0] == tokens[1]
    same_pages(plain, ours)
    assert caplog.text.count("cannot be captured: operation not permitted") == 1


def test_refusals(llama: Any) -> None:
    with pytest.raises(ValueError, match=r"\[decode_graph\] expected a model on a CUDA device; got cpu"):
        ForgeCache(llama, SPEC, graph=True)
    with pytest.raises(ValueError, match=r"expected the model itself for graph=True; got its config"):
        ForgeCache(llama.config, SPEC, graph=True)
    assert ForgeCache(llama, SPEC).graph is None
    assert "forward" not in vars(llama)


@pytest.mark.skipif(not available, reason=reason)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "pad"), [(1, 0), (3, 17)])
def test_generate_on_a_gpu_gives_the_tokens_of_plain_steps(rows: int, pad: int, dtype: torch.dtype) -> None:
    made, inputs = model().to("cuda", dtype), prompt(rows, pad, device="cuda")
    plain, ours = ForgeCache(made, SPEC, graph=False), ForgeCache(made, SPEC)
    options = {"max_new_tokens": 200, "do_sample": False}
    want = made.generate(**inputs, past_key_values=plain, **options)
    got = made.generate(**inputs, past_key_values=ours, **options)
    assert want.tolist() == got.tolist()
    assert ours.graph().replays == 199 - auto_graph.PATIENCE
    same_pages(plain, ours)
