"""The engine: many requests together answer as each does alone, and nothing leaks."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving_engine import PIECE, SPEC, Asked, engine, model
from tolerances import SERVED_LOGITS

from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.serving.request import Busy
from forgeattention.serving.sampling import Sampler, Sampling
from forgeattention.serving.text import TextStream


@pytest.fixture(scope="module")
def llama() -> Any:
    return model()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(97, 122, int(n)).tolist() for n in rng.integers(1, 300, count)]


def shortfall(llama: Any, asked: Asked) -> float:
    """How far the logits of a request's tokens are under the largest ones, in standard deviations, in a cache of its
    own that reads the prompt in the engine's pieces: rounding apart 0 for greedy answers."""
    cache, prompt, new, worst = ForgeCache(llama, SPEC), asked.request.prompt, asked.request.new, 0.0
    pieces = [prompt[at : at + PIECE] for at in range(0, len(prompt), PIECE)] + [[token] for token in new[:-1]]
    with torch.inference_mode():
        for i, piece in enumerate(pieces):
            out = llama(input_ids=torch.tensor([piece]), past_key_values=cache, use_cache=True).logits[0, -1]
            step = i - (len(pieces) - len(new))
            if step >= 0:
                worst = max(worst, float((out.max() - out[new[step]]) / out.std()))
    return worst


def test_requests_answer_together_as_alone(llama):
    made = engine(llama, max_running=5)
    asked = [Asked(made, p, max_tokens=90) for p in prompts(9)]
    for p, one in zip(prompts(9), asked):
        assert one.wait().finish == "length"
        assert one.events[-1].tokens == 90
        assert one.request.prompt == p
        assert shortfall(llama, one) <= SERVED_LOGITS
    assert made.drain(5) == 0
    assert made.running == made.waiting == 0


def test_a_kept_prefix_gives_the_same_answer(llama):
    made = engine(llama)
    prompt = prompts(1)[0] * 4
    first = Asked(made, prompt).wait()
    again = Asked(made, prompt).wait()
    branch = Asked(made, [*prompt[: 2 * PIECE], 97, 98]).wait()
    assert first.request.cached == 0
    assert again.request.cached == (len(prompt) - 1) // PIECE * PIECE > 0
    assert branch.request.cached == 2 * PIECE
    assert first.text == again.text
    assert shortfall(llama, branch) <= SERVED_LOGITS
    made.drain(5)


def test_a_prefix_outlasts_the_process(llama, tmp_path):
    prompt = prompts(1)[0] * 4
    before = engine(llama, folder=tmp_path, max_disk_bytes=1 << 24)
    text = Asked(before, prompt).wait().text
    before.drain(5)
    files = sorted(tmp_path.iterdir())
    assert len(files) == len(prompt) // PIECE
    after = engine(llama, folder=tmp_path, max_disk_bytes=1 << 24)
    asked = Asked(after, prompt).wait()
    assert asked.request.cached > 0
    assert asked.text == text
    after.drain(5)


def test_a_damaged_file_is_not_used(llama, tmp_path, caplog):
    prompt = prompts(1)[0] * 2
    before = engine(llama, folder=tmp_path, max_disk_bytes=1 << 24)
    text = Asked(before, prompt).wait().text
    before.drain(5)
    for file in tmp_path.iterdir():
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)
    after = engine(llama, folder=tmp_path, max_disk_bytes=1 << 24)
    asked = Asked(after, prompt).wait()
    assert asked.request.cached == 0
    assert asked.text == text
    assert "was removed" in caplog.text
    after.drain(5)


def test_a_full_disk_costs_prefixes_only(llama, tmp_path, caplog, monkeypatch):
    def full(self: Any, path: Path, model: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ForgeCache, "save", full)
    made = engine(llama, folder=tmp_path, max_disk_bytes=1 << 24)
    Asked(made, prompts(1)[0] * 3).wait()
    assert made.drain(5) == 0
    assert "No space left" in caplog.text
    assert not list(tmp_path.iterdir())


def test_the_disk_is_bounded(llama, tmp_path):
    made = engine(llama, folder=tmp_path, max_disk_bytes=600_000)
    for p in prompts(6, 3):
        Asked(made, p * 2).wait()
    made.drain(5)
    sizes = [f.stat().st_size for f in tmp_path.iterdir()]
    assert sizes
    assert sum(sizes) <= 600_000


def test_room_is_kept_for_whole_answers(llama):
    made = engine(llama, max_pages=12, prefixes=8)
    asked = [Asked(made, p, max_tokens=100) for p in ([p[:200] * 2 for p in prompts(8, 5)])]
    most = 0
    for one in asked:
        one.wait()
        most = max(most, made.pages_in_use)
        assert one.finish == "length", one.events[-1].error
    assert most <= 12
    with pytest.raises(ValueError, match=r"\[serve\] expected at most 768 tokens"):
        Asked(made, [97] * 700, max_tokens=100)
    made.drain(5)


def test_pages_come_back(llama):
    made = engine(llama, prefixes=0)
    for _ in range(2):
        asked = [Asked(made, p * 2) for p in prompts(5, 2)]
        asked[0].some.wait(60)
        made.cancel(asked[1].request)
        for one in asked:
            one.wait()
    made.drain(5)
    assert made.pages_in_use == 0


def test_cancelled_requests_end_early(llama):
    made = engine(llama)
    long = Asked(made, [97] * 5, max_tokens=3000)
    other = Asked(made, [98] * 5, max_tokens=60)
    assert long.some.wait(60)
    made.cancel(long.request)
    assert long.wait().finish == "cancelled"
    assert shortfall(llama, other.wait()) <= SERVED_LOGITS
    assert long.events[-1].tokens < 3000
    made.drain(5)


def test_a_full_queue_refuses(llama):
    made = engine(llama, max_running=1, max_waiting=2)
    long = Asked(made, [97], max_tokens=3000)
    assert long.some.wait(60)
    waiting = [Asked(made, [97]) for _ in range(2)]
    with pytest.raises(Busy) as busy:
        Asked(made, [97])
    assert busy.value.retry_after >= 1
    made.cancel(long.request)
    assert [one.wait().finish for one in waiting] == ["length", "length"]
    made.drain(5)
    with pytest.raises(Busy):
        Asked(made, [97])


def test_draining_cuts_what_takes_too_long(llama):
    made = engine(llama)
    long = Asked(made, [97], max_tokens=3500)
    assert long.some.wait(60)
    assert made.drain(0.2) == 1
    assert long.wait().finish == "cancelled"
    assert not made.alive


def test_a_failing_step_ends_its_requests_only(llama, monkeypatch):
    made = engine(llama)
    real, calls = made._step, []

    def failing(tokens: Any, positions: Any, cache: Any) -> Any:
        calls.append(len(tokens))
        if len(calls) == 3:
            raise RuntimeError("a planted fault")
        return real(tokens, positions, cache)

    monkeypatch.setattr(made, "_step", failing)
    first = Asked(made, [97] * 5, max_tokens=50).wait()
    assert first.finish == "error"
    assert "a planted fault" in first.events[-1].error
    assert shortfall(llama, Asked(made, [98] * 5).wait()) <= SERVED_LOGITS
    made.drain(5)


def test_an_engine_that_fails_lets_nobody_wait(llama, monkeypatch):
    """A fault outside of any request's step: every request ends with an error, and no new one is taken."""
    made = engine(llama, max_running=2)
    running = [Asked(made, [97] * 5, max_tokens=3000) for _ in range(3)]
    assert running[0].some.wait(60)

    def failing() -> None:
        raise MemoryError("a planted fault")

    monkeypatch.setattr(made, "_admit", failing)
    for asked in running:
        assert asked.wait().finish == "error"
        assert "the engine has failed: MemoryError: a planted fault" in asked.events[-1].error
    assert not made.alive
    with pytest.raises(Busy, match="the engine has failed"):
        Asked(made, [98] * 5)
    assert made.drain(1) == 0


def test_draws_do_not_depend_on_the_batch(llama):
    made = engine(llama)
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "max_tokens": 40}
    lone = Asked(made, [99] * 30, **options).wait()
    together = [Asked(made, p, max_tokens=60) for p in prompts(4)]
    again = Asked(made, [99] * 30, **options).wait()
    assert lone.text == again.text
    assert lone.text != Asked(made, [99] * 30, **(options | {"seed": 8})).wait().text
    for one in together:
        one.wait()
    made.drain(5)


def test_top_p_keeps_the_likeliest():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    sampler = Sampler(Sampling(1, temperature=1.0, top_p=0.6, seed=0))
    assert {sampler(logits) for _ in range(200)} == {0, 1}
    sampler = Sampler(Sampling(1, temperature=1.0, seed=0))
    share = sum(sampler(logits) == 0 for _ in range(2000)) / 2000
    assert 0.45 < share < 0.55


@pytest.mark.parametrize("temperature", [5e-324, 1e-38, 1e-3])
def test_low_temperatures_take_the_likeliest(temperature):
    sampler = Sampler(Sampling(1, temperature=temperature, top_p=0.5, seed=0))
    assert {sampler(torch.tensor([-40.0, 3.0, 2.0])) for _ in range(20)} == {1}


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("abcdef", ("cd",), "ab"),
        ("abcabd", ("abd",), "abc"),
        ("abcab", ("abd",), "abcab"),
        ("xyz", ("q", "yz"), "x"),
        ("é–ü", (), "é–ü"),
    ],
)
def test_stop_texts(text, stop, want):
    import tiny

    tokenizer = tiny.tokenizer()
    stream, got = TextStream(tokenizer, stop), ""
    for token in tokenizer(text).input_ids:
        got += stream.push(token)
        if stream.stopped:
            break
    else:
        got += stream.flush()
    assert got == want


def test_models_that_cannot_be_packed_are_refused():
    import tiny

    sliding = tiny.llama(attn_implementation="forge", head_dim=64, hidden_size=64).float()
    sliding.config.sliding_window, sliding.config.layer_types = 32, ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"\[serve\] expected a model whose 2 layers can all be packed; got 1"):
        engine(sliding)
