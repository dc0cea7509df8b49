"""What the next token is, by every option, and its log-probability."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from serving_engine import HELLO, PIECE, SPEC, Running, chunks, engine, model, openai_client, post, says, served, stream

from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.serving.api import create_app
from forgeattention.serving.sampling import Sampler, Sampling, score


@pytest.fixture(scope="module")
def running() -> Any:
    yield from served()


@pytest.fixture(scope="module")
def client(running) -> Any:
    yield from openai_client(running)


def test_log_probabilities(running, client):
    chat = client.chat.completions.create(model="tiny", **HELLO, logprobs=True, top_logprobs=3)
    content = chat.choices[0].logprobs.content
    assert len(content) == 9
    for entry in content:
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)  # the likeliest was taken
        assert sorted((top.logprob for top in entry.top_logprobs), reverse=True) == [
            t.logprob for t in entry.top_logprobs
        ]
    data = b"".join(bytes(entry.bytes) for entry in content)
    assert data.decode(errors="replace") == chat.choices[0].message.content
    plain = client.completions.create(model="tiny", prompt="hello>", max_tokens=9, temperature=0, logprobs=3)
    found = plain.choices[0].logprobs
    assert found.token_logprobs == pytest.approx([entry.logprob for entry in content])
    assert found.tokens == [entry.token for entry in content]
    assert [len(top) for top in found.top_logprobs] == [3] * 9
    streamed = chunks(stream(running.port, "/v1/chat/completions", HELLO | {"logprobs": True, "top_logprobs": 3}))
    pieces = [c["choices"][0]["logprobs"]["content"] for c in streamed if c["choices"][0]["logprobs"]]
    assert [e["logprob"] for piece in pieces for e in piece] == pytest.approx([entry.logprob for entry in content])
    assert plain.choices[0].text == chat.choices[0].message.content


def packed(llama: Any, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary] by a cache of its own, read in the engine's pieces."""
    cache, found = ForgeCache(llama, SPEC), []
    with torch.inference_mode():
        for at in range(0, len(tokens), PIECE):
            piece = torch.tensor([tokens[at : at + PIECE]])
            found.append(llama(input_ids=piece, past_key_values=cache, use_cache=True).logits[0])
    return torch.cat(found).log_softmax(-1)


def test_echo_scores_the_prompt_as_lm_eval_asks(running):
    """lm-eval scores a continuation by the log-probabilities of context and continuation, both sent as tokens."""
    llama, words = model(), tiny.tokenizer()
    texts = ["the rivers of babylon " * 9 + "flow", "short"]
    rows = [words(text).input_ids for text in texts]
    body = {"prompt": rows, "max_tokens": 1, "logprobs": 1, "temperature": 0, "seed": 1234, "echo": True}
    for _ in range(2):  # the second time the prompts are kept prefixes
        status, _, answer = post(running.port, "/v1/completions", body)
        assert status == 200, answer
        for row, text, choice in zip(rows, texts, answer["choices"]):
            assert choice["text"].startswith(text)
            found = choice["logprobs"]
            assert found["tokens"][: len(row)] == list(text)
            assert found["text_offset"][: len(row)] == list(range(len(row)))
            assert found["token_logprobs"][0] is None
            assert found["top_logprobs"][0] is None
            want = [float(logits[token]) for logits, token in zip(packed(llama, row), row[1:])]
            assert found["token_logprobs"][1 : len(row)] == pytest.approx(want, abs=1e-3)
            for i, top in enumerate(found["top_logprobs"][1:], 1):
                assert found["tokens"][i] in top
                assert max(top.values()) >= found["token_logprobs"][i]
    scored = post(running.port, "/v1/completions", body | {"max_tokens": 0})[2]["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in scored] == [len(row) for row in rows]
    assert [choice["text"] for choice in scored] == texts


def test_penalties_and_bias_change_what_is_said(running):
    def ask(**more: Any) -> str:
        body = {"prompt": "ab", "max_tokens": 12, "temperature": 0, **more}
        status, _, answer = post(running.port, "/v1/completions", body)
        assert status == 200, answer
        return answer["choices"][0]["text"]

    plain = ask()
    token = tiny.tokenizer()("q").input_ids[0]
    assert ask(logit_bias={str(token): 100}) == "q" * 12
    assert len(set(ask(logit_bias={str(token): 100}, frequency_penalty=2, max_tokens=120))) > 1
    assert ask(top_k=1, temperature=2) == plain == ask(min_p=1.0, temperature=2)
    assert ask(repetition_penalty=1.0, presence_penalty=0, top_k=0, min_p=0) == plain


def test_end_tokens_min_tokens_and_stop_tokens():
    words = tiny.tokenizer()
    made = engine(model(), words)
    assert made.ends == {256}
    says(made, [*words("ab").input_ids, 256, *words("cd").input_ids, 256])
    server = Running(create_app(made, "tiny"))

    def ask(**more: Any) -> tuple[str, str]:
        answer = post(server.port, "/v1/completions", {"prompt": "xyz", "max_tokens": 5, "temperature": 0, **more})[2]
        return answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]

    try:
        assert ask() == ("ab", "stop")
        assert ask(ignore_eos=True) == ("abcd", "length")
        assert ask(stop_token_ids=words("b").input_ids) == ("a", "stop")
        text, finish = ask(min_tokens=4)
        assert (text[:2], text[3:], finish) == ("ab", "c" if len(text) == 4 else text[3:], "length")
    finally:
        server.stop()
        made.drain(5)


def test_end_tokens_are_the_configs_and_the_tokenizers():
    from forgeattention.serving.text import end_tokens

    llama, words = model(), tiny.tokenizer()
    llama.generation_config.eos_token_id = [7, 9]
    assert end_tokens(llama, words) == {7, 9, 256}
    llama.generation_config.eos_token_id, llama.config.eos_token_id = None, 5
    assert end_tokens(llama, words) == {5, 256}
    words.eos_token = None
    assert end_tokens(llama, words) == {5}


def test_half_a_character_at_the_end():
    made = engine(model())
    half = tiny.tokenizer()("ok€").input_ids[:-1]
    says(made, half)
    server = Running(create_app(made, "tiny"))
    body = {"prompt": "xyz", "max_tokens": len(half), "temperature": 0}
    try:
        answer = post(server.port, "/v1/completions", body | {"logprobs": 0})[2]["choices"][0]
        assert answer["text"] == "ok\ufffd"
        assert answer["logprobs"]["tokens"][2:] == ["bytes:\\xe2", "bytes:\\x82"]
        streamed = chunks(stream(server.port, "/v1/completions", body))
        assert "".join(c["choices"][0]["text"] for c in streamed) == "ok\ufffd"
    finally:
        server.stop()
        made.drain(5)


def test_excluded_tokens_have_a_number_for_json():
    from forgeattention.serving.answers import LEAST, TextChoice
    from forgeattention.serving.request import Event
    from forgeattention.serving.sampling import Scored
    from forgeattention.serving.text import TokenTexts

    choice = TextChoice(0, TokenTexts(tiny.tokenizer()), "")
    choice.push(Event("a", "stop", 1, scores=(Scored(64, 0.0, ((64, 0.0), (65, -math.inf))),)))
    assert min(choice.whole()["logprobs"]["top_logprobs"][0].values()) == LEAST


def likely(how: Sampling, logits: Any, prompt: Any = (), new: Any = ()) -> Any:
    """Probabilities of the next token, in NumPy, by the definitions."""
    x = np.array(logits, np.float64)
    for token, bias in how.logit_bias.items():
        x[token] += bias
    for token in {*prompt, *new}:
        x[token] = x[token] / how.repetition_penalty if x[token] > 0 else x[token] * how.repetition_penalty
    for token in set(new):
        x[token] -= how.presence_penalty + how.frequency_penalty * list(new).count(token)
    order = np.argsort(-x, kind="stable")
    keep = order[: how.top_k or len(x)]
    p = np.zeros(len(x))
    p[keep] = np.exp((x[keep] - x.max()) / how.temperature)
    p /= p.sum()
    total = 0.0
    for token in keep:
        if total >= how.top_p or p[token] < how.min_p * p.max():
            p[token] = 0
        else:
            total += p[token]
    return p / p.sum()


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 5, "top_p": 0.8, "min_p": 0.15, "temperature": 1.7},
        {"logit_bias": {2: 3.0, 0: -100.0}},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"repetition_penalty": 0.8, "frequency_penalty": -1.0, "logit_bias": {7: 1.0}, "top_p": 0.9},
    ],
)
def test_draws_follow_the_definitions(how):
    rng = np.random.default_rng(0)
    logits, prompt, new = rng.normal(size=8) * 2, [1, 2, 2], [3, 3, 5]
    sampling = Sampling(10, **{"temperature": 1.0, "seed": 0, **how})
    want, seen, draws = likely(sampling, logits, prompt, new), np.zeros(8), 4000
    sampler = Sampler(sampling, prompt)
    for token in new:  # as if drawn: nothing else is likely
        forced = torch.full((8,), -1e9)
        forced[token] = 1e9
        sampler(forced)
    state = sampler.__dict__.copy()
    for _ in range(draws):
        sampler._counts, sampler._seen = dict(state["_counts"]), set(state["_seen"])
        seen[sampler(torch.tensor(logits, dtype=torch.float32))] += 1
    assert (seen[want == 0] == 0).all()
    # Five standard deviations of a share of so many draws.
    assert (np.abs(seen / draws - want) <= 5 * np.sqrt(want * (1 - want) / draws) + 1e-9).all()


def test_scores_are_log_probabilities():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    exact = logits.double().log_softmax(-1)
    for row, scored in enumerate(score(logits, [4, 0, 49], 5)):
        assert scored.token == [4, 0, 49][row]
        assert scored.logprob == pytest.approx(float(exact[row, scored.token]), abs=1e-5)
        values, ids = exact[row].topk(5)
        assert [token for token, _ in scored.top] == ids.tolist()
        assert [value for _, value in scored.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert score(logits[:1], [4], 0)[0].top == ()


def test_nothing_left_to_draw_is_an_error():
    sampler = Sampler(Sampling(3, min_tokens=2), ends=[0, 1])
    with pytest.raises(ValueError, match="expected a token that may come next; got none that the request allows"):
        sampler(torch.tensor([3.0, 2.0]))
