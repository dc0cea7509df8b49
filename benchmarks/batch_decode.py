"""Greedy answers of any cache to many prompts at once, behind one shared beginning that is read once.

Caches of this package are the real ones: the beginning's pages are forked, not copied, and prompts are padded on the
left. Exact and simulated caches are `row_states.RowStates`. On a GPU the decode steps of both are CUDA graphs.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import peer_caches
import row_states
import torch
from candidates import Candidate

from forgeattention.integrations.hf.graph import DecodeGraph
from forgeattention.tools.evaluation.streaming import attention, spans, step

BLOCK = 2048
CHECK = 16
"""Steps between two looks at which rows have ended."""
Ended = Callable[[list[int]], bool]


@torch.no_grad()
def answers(
    model: Any,
    prompts: Sequence[torch.Tensor],
    candidate: Candidate,
    count: int,
    *,
    shared: torch.Tensor | None = None,
    stop: bool = True,
    ended: Ended | None = None,
    block: int = BLOCK,
    graph: bool = True,
) -> list[list[int]]:
    """Greedy answers.

    Args:
        model: a transformers causal language model whose layers all have full attention.
        prompts: int64 [tokens] each.
        candidate: the cache.
        count: most tokens of an answer.
        shared: tokens in front of every prompt, int64 [tokens]; read once.
        stop: end answers at the model's end tokens.
        ended: whether an answer, given its tokens so far, needs no more.
        block: tokens read at once.
        graph: replay decode steps as a CUDA graph, on a GPU.

    Returns:
        The new tokens of every prompt, without the end token.
    """
    rows = len(prompts)
    run = _packed if candidate.spec is not None and candidate.implementation == "forge" else _states
    stops = set(torch.tensor(model.generation_config.eos_token_id).reshape(-1).tolist()) if stop else set()
    out: list[torch.Tensor] = []
    done = [False] * rows
    graph = graph and model.device.type == "cuda"
    with contextlib.closing(run(model, prompts, candidate, count, shared, block, graph)) as steps:
        for new in steps:
            out.append(new.clone())
            if len(out) == count:
                break
            if len(out) % CHECK == 0 and (stops or ended is not None):
                texts = torch.stack(out, 1).tolist()
                done = [gone or _over(text, stops, ended) for gone, text in zip(done, texts)]
                if all(done):
                    break
    tokens = torch.stack(out, 1).tolist()
    return [_cut(text, stops) for text in tokens]


def answers_anyway(*args: Any, **options: Any) -> tuple[list[list[int]], bool]:
    """`answers`, without a graph where that fails, which is told; and whether it was with one."""
    try:
        return answers(*args, **options), True
    except RuntimeError:
        traceback.print_exc()
        return answers(*args, **options, graph=False), False


def _over(text: list[int], stops: set[int], ended: Ended | None) -> bool:
    return any(t in stops for t in text) or (ended is not None and ended(text))


def _cut(text: list[int], stops: set[int]) -> list[int]:
    return text[: next((i for i, t in enumerate(text) if t in stops), len(text))]


def _read(model: Any, ids: torch.Tensor, cache: Any, block: int) -> None:
    for start, last in spans(ids.shape[1], block):
        step(model, ids[:, start:last], cache, keep=1)


def _packed(
    model: Any, prompts: Sequence[torch.Tensor], candidate: Candidate, count: int, shared: Any, block: int, graph: bool
) -> Iterator[torch.Tensor]:
    """New tokens [rows] of every step, with a packed cache of this package."""
    device, rows = model.device, len(prompts)
    longest, before = max(map(len, prompts)), 0 if shared is None else len(shared)
    ids = torch.zeros(rows, longest, dtype=torch.int64)
    mask = torch.ones(rows, before + longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, before : before + longest - len(prompt)] = 0
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with attention(model, candidate.implementation):
        cache = candidate.make(model)
        if shared is not None:
            _read(model, shared[None].to(device), cache, block)
            cache = cache.fork([0] * rows)
        for start, last in spans(longest, block):
            kept = mask[:, : before + last]
            at = positions[:, before + start : before + last]
            logits = model(
                ids[:, start:last], past_key_values=cache, attention_mask=None if bool(kept.all()) else kept,
                position_ids=at, use_cache=True, logits_to_keep=1,
            ).logits  # fmt: skip
        at = positions[:, -1:] + 1
        with DecodeGraph(model, cache, before + longest + count + 1) if graph else contextlib.nullcontext():
            while True:
                new = logits[:, -1].float().argmax(-1)
                yield new
                logits = model(
                    new[:, None], past_key_values=cache, position_ids=at, use_cache=True, logits_to_keep=1
                ).logits
                at = at + 1


def _states(
    model: Any, prompts: Sequence[torch.Tensor], candidate: Candidate, count: int, shared: Any, block: int, graph: bool
) -> Iterator[torch.Tensor]:
    """The same with an exact or simulated cache."""
    device, rows = model.device, len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    ids = torch.zeros(rows, longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    ids = ids.to(device)
    beginning = None
    if shared is not None:
        beginning = candidate.make(model)
        with attention(model, candidate.implementation):
            _read(model, shared[None].to(device), beginning, block)
    sinks, window = 4, 128
    if candidate.simulated is not None:
        layer = next(x for x in candidate.make(model).layers if isinstance(x, peer_caches.PeerLayer))
        sinks, window = layer.coded, layer.window
    cache = row_states.RowStates(model, rows, longest + count + 1, candidate.simulated, sinks, window, beginning)
    del beginning
    last = torch.tensor(lengths, device=device) - 1
    at = torch.arange(longest, device=device)[None] + cache.before + cache.held
    with attention(model, row_states.NAME):
        final = torch.empty(rows, model.config.get_text_config().hidden_size, dtype=model.dtype, device=device)
        for start, end in spans(longest, block):
            hidden = model.model(
                ids[:, start:end], past_key_values=cache, position_ids=at[:, start:end], use_cache=True
            ).last_hidden_state
            here = (start <= last) & (last < end)
            final[here] = hidden[here, last[here] - start]
            cache.read(end - start, lengths)
        logits = model.lm_head(final)
        cache.end_of_prompts()
        ids, at = torch.zeros(rows, 1, dtype=torch.int64, device=device), torch.zeros(rows, 1, dtype=torch.int64)
        at = at.to(device)
        replayed: Any = None
        held: Any = None
        while True:
            new = logits.float().argmax(-1)
            yield new
            cache.code()
            ids.copy_(new[:, None])
            at.copy_(cache.lengths[:, None] + cache.before)
            if not graph:
                logits = _step(model, ids, cache, at)
            else:
                if replayed is None:
                    replayed, held = _capture(model, ids, cache, at)
                replayed.replay()
                logits = held
            cache.advance()


def _step(model: Any, ids: torch.Tensor, cache: Any, at: torch.Tensor) -> torch.Tensor:
    return model(ids, past_key_values=cache, position_ids=at, use_cache=True).logits[:, -1]


def _capture(model: Any, ids: torch.Tensor, cache: Any, at: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """One decode step as a CUDA graph; running it twice writes the same states."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            _step(model, ids, cache, at)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = _step(model, ids, cache, at)
    return graph, held
