"""Packed blocks and sinks go to host memory and back through vLLM's own offloading connector.

That connector copies with CUDA's streams; on the CPU, stand-ins copy at once. What is copied, where to and when is its.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams

CONNECTOR = {
    "kv_connector": "SimpleCPUOffloadConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 27},
}


class Stream:
    def __init__(self, priority: int = 0) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class Event:
    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    synchronize = record


class Copies:
    """Copies blocks at once, and counts the bytes by direction."""

    moved: list[tuple[bool, int]]

    def init(self, device: dict[str, torch.Tensor], host: dict[str, torch.Tensor], *args: Any) -> None:
        self.device, self.host = device, host

    def launch_copy(
        self,
        src_blocks: list[int],
        dst_blocks: list[int],
        is_store: bool,
        event_idx: int,
        events_list: list[Any],
        wait_event: Any = None,
    ) -> None:
        source, target = (self.device, self.host) if is_store else (self.host, self.device)
        for name, region in source.items():
            target[name][dst_blocks] = region[src_blocks]
        count = sum(region[0].numel() for region in source.values()) * len(src_blocks)
        self.moved.append((is_store, count))
        events_list.append((event_idx, Event()))

    def shutdown(self) -> None:
        pass


class Torch:
    """torch, with streams and events of a machine without CUDA."""

    cuda = SimpleNamespace(Stream=Stream, current_stream=lambda: None)
    Event = Event

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Whether each copy was a store, and its bytes."""
    from vllm.v1.simple_kv_offload import worker

    monkeypatch.setattr(Copies, "moved", [], raising=False)
    monkeypatch.setattr(worker, "torch", Torch())
    monkeypatch.setattr(worker, "DmaCopyBackend", Copies)
    return Copies.moved


def answers(llm: Any, prompts: list[list[int]]) -> tuple[list[Any], list[int]]:
    """Tokens and log-probabilities of every answer; prompt tokens that were not computed."""
    ask = SamplingParams(temperature=0, max_tokens=70, ignore_eos=True, detokenize=False, logprobs=3)
    outs = llm.generate([{"prompt_token_ids": x} for x in prompts], ask, use_tqdm=False)
    said = [
        (list(o.outputs[0].token_ids), [{k: v.logprob for k, v in step.items()} for step in o.outputs[0].logprobs])
        for o in outs
    ]
    return said, [o.num_cached_tokens for o in outs]


def test_a_prefix_comes_back_from_host_memory(
    llama: Callable[..., str], engine: Callable[..., Any], moved: list[tuple[bool, int]]
) -> None:
    options = {"skip_tokenizer_init": True, "max_model_len": 1024, "max_num_batched_tokens": 256}
    llm = engine(llama(), {}, kv_transfer_config=CONNECTOR, **options)
    prompts = [[(7 * i + 13 * j * j) % 500 + 3 for j in range(n)] for i, n in enumerate((600, 641, 130))]
    for prompt in prompts:
        answers(llm, [prompt])
    warm, hits = zip(*(answers(llm, [prompt]) for prompt in prompts))
    assert [hit for (hit,) in hits] == [576, 640, 128]
    stored = sum(count for store, count in moved if store)
    assert stored
    assert not [count for store, count in moved if not store]
    assert llm.reset_prefix_cache()
    back, hits = zip(*(answers(llm, [prompt]) for prompt in prompts))
    assert [hit for (hit,) in hits] == [576, 640, 128]
    loaded = sum(count for store, count in moved if not store)
    # A prefix is read in the same way, wherever its blocks were: the same bits.
    assert back == warm
    core = llm.llm_engine.engine_core.engine_core
    config = core.scheduler.kv_cache_config
    block = config.kv_cache_tensors[0].size // config.num_blocks
    # Whole pages, and one exact block of sinks each.
    assert loaded == block * (576 // 64 + 640 // 64 + 128 // 64 + 3)
    assert loaded <= stored


def test_other_connectors_are_refused(llama: Callable[..., str], engine: Callable[..., Any]) -> None:
    other = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    with pytest.raises(Exception, match=r"expected no KV connector but SimpleCPUOffloadConnector.*got Offloading"):
        engine(llama(), {}, skip_tokenizer_init=True, kv_transfer_config=other)
