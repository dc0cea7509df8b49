"""OpenAI's shapes, as its own client and other people's send and read them."""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest
import tiny
from serving_engine import HELLO, Running, chunks, engine, model, openai_client, post, served, stream

from forgeattention.serving.api import create_app


@pytest.fixture(scope="module")
def running() -> Any:
    yield from served()


@pytest.fixture(scope="module")
def client(running) -> Any:
    yield from openai_client(running)


def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), text


def test_the_role_comes_in_the_first_delta_only(running, client):
    found = chunks(stream(running.port, "/v1/chat/completions", HELLO))
    deltas = [chunk["choices"][0]["delta"] for chunk in found]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all("role" not in delta for delta in deltas[1:])
    assert deltas[-1] == {}
    assert found[-1]["choices"][0]["finish_reason"] == "length"
    text = client.chat.completions.create(model="tiny", **HELLO).choices[0].message.content
    assert "".join(delta.get("content", "") for delta in deltas) == text
    # OpenAI's client adds up the deltas; a stop text makes some of them empty.
    with client.chat.completions.stream(model="tiny", **HELLO, stop=[text[4:6]]) as events:
        message = events.get_final_completion().choices[0].message
    assert (message.role, message.content) == ("assistant", text[: text.index(text[4:6])])


def test_usage_is_null_until_the_last_event(running):
    body = {"prompt": "x", "max_tokens": 4, "stream_options": {"include_usage": True}}
    found = chunks(stream(running.port, "/v1/completions", body))
    assert [chunk["usage"] for chunk in found[:-1]] == [None] * (len(found) - 1)
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] == 4
    assert "usage" not in chunks(stream(running.port, "/v1/completions", {"prompt": "x", "max_tokens": 2}))[0]


NULLS = (
    *("model", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty"),
    *("frequency_penalty", "repetition_penalty", "logit_bias", "n", "stop", "stop_token_ids", "ignore_eos", "seed"),
    *("stream", "stream_options", "response_format", "logprobs", "user", "a_field_of_tomorrow"),
)


@pytest.mark.parametrize("kind", ["chat/completions", "completions"])
def test_null_is_the_default_of_every_field(running, kind):
    chat = kind == "chat/completions"
    prompt = {"messages": HELLO["messages"]} if chat else {"prompt": "hello>"}
    plain = post(running.port, f"/v1/{kind}", {**prompt, "model": "tiny", "max_tokens": 4, "temperature": 0})[2]
    more = (
        ("tools", "tool_choice", "top_logprobs", "parallel_tool_calls", "max_completion_tokens") if chat else ("echo",)
    )
    nulls = dict.fromkeys((*NULLS, *more)) | {"max_tokens": 4, "temperature": 0}
    status, _, answer = post(running.port, f"/v1/{kind}", prompt | nulls)
    assert status == 200, answer
    assert answer["choices"] == plain["choices"]
    for field in ("max_tokens", "temperature"):
        status, _, answer = post(running.port, f"/v1/{kind}", prompt | {"max_tokens": 4} | {field: None})
        assert status == 200, answer


def test_prompts_in_all_four_forms(running):
    def ask(prompt: Any, **more: Any) -> Any:
        status, _, answer = post(
            running.port, "/v1/completions", {"prompt": prompt, "max_tokens": 6, "temperature": 0, **more}
        )
        assert status == 200, answer
        return answer

    words = tiny.tokenizer()
    sea, sky = ask("The sea")["choices"][0]["text"], ask("The sky is")["choices"][0]["text"]
    assert ask(["The sea"])["choices"][0]["text"] == sea  # as LangChain and lm-eval send it
    assert ask(words("The sea").input_ids)["choices"][0]["text"] == sea
    assert ask([words("The sea").input_ids])["choices"][0]["text"] == sea
    both = ask(["The sea", "The sky is"])
    assert [(c["index"], c["text"]) for c in both["choices"]] == [(0, sea), (1, sky)]
    assert both["usage"]["prompt_tokens"] == len("The sea") + len("The sky is")
    assert both["usage"]["completion_tokens"] == 12
    twice = ask([words(text).input_ids for text in ("The sea", "The sky is")], n=2)
    assert [(c["index"], c["text"]) for c in twice["choices"]] == [(0, sea), (1, sea), (2, sky), (3, sky)]
    assert twice["usage"]["prompt_tokens"] == len("The sea") + len("The sky is")
    streamed = chunks(
        stream(
            running.port, "/v1/completions", {"prompt": ["The sea", "The sky is"], "max_tokens": 6, "temperature": 0}
        )
    )
    for i, want in enumerate((sea, sky)):
        assert "".join(c["choices"][0]["text"] for c in streamed if c["choices"][0]["index"] == i) == want
    assert sum(c["choices"][0]["finish_reason"] == "length" for c in streamed) == 2


def test_n_answers_share_the_prompt(running, client):
    made = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "z" * 200}], n=3, max_tokens=20, temperature=1, seed=5
    )
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in made.choices]
    assert len(set(texts)) == 3
    assert made.usage.prompt_tokens == 201
    assert made.usage.completion_tokens == 60
    again = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "z" * 200}], n=3, max_tokens=20, temperature=1, seed=5
    )
    assert [choice.message.content for choice in again.choices] == texts
    status, _, answer = post(running.port, "/v1/completions", {"prompt": "x", "n": 9})
    assert status == 400
    assert "expected at most 8 answers to a prompt" in answer["error"]["message"]
    status, _, answer = post(running.port, "/v1/completions", {"prompt": ["x"] * 13})
    assert status == 400
    assert "expected at most 12 answers per request; got 13" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "text"}),
        ("seed", -1),
        ("best_of", 1),
        ("logit_bias", {}),
        ("stop", []),
        ("user", "me"),
        ("store", False),
        ("service_tier", "auto"),
        ("include_stop_str_in_output", False),
        ("skip_special_tokens", True),
        ("use_beam_search", False),
        ("suffix", ""),
        ("top_k", -1),
        ("mirostat", 0),
        ("structured_outputs", None),
        ("a_field_of_tomorrow", None),
    ],
)
def test_what_changes_nothing_passes(running, path, field, value):
    status, _, answer = post(running.port, path, {"prompt": "x"} | {field: value, "max_tokens": 2} if "chat" not in path
                             else HELLO | {field: value, "max_tokens": 2})  # fmt: skip
    assert status == 200, answer


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("suffix", "b", "suffix: not supported"),
        ("structured_outputs", {"json": {}}, "structured_outputs: not supported"),
        ("guided_json", {}, "guided_json: not supported"),
        ("typical_p", 0.5, "typical_p: not supported; only 1 passes"),
        ("mirostat", False, "mirostat: not supported; only 0 passes"),
        ("prompt_logprobs", 1, "prompt_logprobs: not supported"),
        ("best_of", 2, "best_of"),
        ("temprature", 0.3, "temprature: this server knows no such field"),
        ("n", 129, "n: input should be less than or equal to 128; got 129"),
        ("stop", ["a"] * 17, "stop: expected at most 16 texts; got 17"),
        ("stop", 5, "stop: expected a text or a list of texts"),
        ("logit_bias", {"a": 1}, "logit_bias: expected numbers by token"),
        ("logit_bias", {"500": 1}, "expected tokens under 257"),
        ("stop_token_ids", [999], "expected tokens under 257"),
        ("stream_options", {"include_usage": True}, "stream_options: expected with stream true"),
        ("stream_options", {"chunk_size": 2}, "stream_options.chunk_size: this server knows no such field"),
        ("response_format", {"type": "yaml"}, "response_format.type: input should be 'text', 'json_object'"),
        ("response_format", {"type": "json_schema"}, "response_format.json_schema: expected with type json_schema"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(running, field, value, text):
    for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", HELLO)):
        status, _, answer = post(running.port, path, body | {field: value})
        assert status == 400, answer
        assert text in answer["error"]["message"]
        if "tokens under" not in text:
            assert answer["error"]["param"].startswith(field)


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        ("completions", {"prompt": [1, -2]}, "prompt: expected tokens of 0 or more; got -2"),
        ("completions", {"prompt": ["a", 1]}, 'prompt: expected texts alone, or tokens alone; got "a"'),
        ("completions", {"prompt": {"a": 1}}, "prompt: expected a text, a list of tokens, or a list of these"),
        ("completions", {"prompt": "hi \ud83d"}, "prompt: expected text; got the unpaired surrogate U+D83D in it"),
        ("completions", {"prompt": "x", "max_tokens": "many"}, 'max_tokens: input should be a valid integer'),
        ("chat/completions", {"messages": []}, "messages: "),
        ("chat/completions", {"messages": [{"role": "user", "content": "hi \ud83d"}]}, "messages.0.content: expected"),
        ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, "messages.0.role: input should"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content: expected a text; only"),
        ("chat/completions", {"messages": [{"role": "user", "content": None}]}, "messages.0.content: expected a text"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            'messages.0.content: expected parts of type text; part 0 is "image_url"',
        ),
        ("chat/completions", HELLO | {"top_logprobs": 2}, "top_logprobs: expected with logprobs true"),
        ("chat/completions", HELLO | {"tool_choice": "required"}, "tool_choice: expected tools with it"),
        ("chat/completions", HELLO | {"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs: "),
        (
            "chat/completions",
            HELLO | {"tools": [{"type": "function", "function": {"name": "f"}}]},
            "tools: the model's chat template shows no way to call them",
        ),
    ],
)  # fmt: skip
def test_a_refusal_says_the_cause(running, path, body, text):
    status, headers, answer = post(running.port, f"/v1/{path}", body)
    assert status == 400, answer
    assert headers["content-type"] == "application/json"
    assert text in answer["error"]["message"]
    assert answer["error"]["param"] == text.partition(":")[0]


def test_content_parts_of_text_are_joined(running):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    body = HELLO | {"messages": [{"role": "user", "content": parts}]}
    want = post(running.port, "/v1/chat/completions", HELLO)[2]["choices"]
    assert post(running.port, "/v1/chat/completions", body)[2]["choices"] == want


def test_models_health_and_errors_of_the_router(running):
    assert json.loads(get(running.port, "/v1/models/tiny")[2])["id"] == "tiny"
    status, _, text = get(running.port, "/v1/models/owner/other")
    assert status == 404
    assert json.loads(text)["error"]["code"] == "model_not_found"
    assert get(running.port, "/health", "HEAD")[0] == 200
    for method, path, want in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/health", 405)):
        status, _, text = get(running.port, path, method)
        assert status == want
        assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}


def test_the_scheme_bearer_in_any_case():
    made = engine(model())
    server = Running(create_app(made, "tiny", api_key="a key"))
    try:
        for scheme, want in (("bearer", 200), ("Bearer", 200), ("BEARER", 200), ("Basic", 401), ("", 401)):
            assert get(server.port, "/v1/models", authorization=f"{scheme} a key".strip())[0] == want
    finally:
        server.stop()
        made.drain(5)


def test_pages_of_named_origins_may_ask():
    made = engine(model())
    server, closed = Running(create_app(made, "tiny", cors=["http://a.example"])), Running(create_app(made, "tiny"))
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    try:
        status, headers, _ = get(server.port, "/v1/completions", "OPTIONS", Origin="http://a.example", **asks)
        assert status == 200
        assert headers["access-control-allow-origin"] == "http://a.example"
        assert get(server.port, "/v1/completions", "OPTIONS", Origin="http://b.example", **asks)[0] == 400
        assert get(server.port, "/v1/nothing", Origin="http://a.example")[1]["access-control-allow-origin"]
        assert "access-control-allow-origin" not in get(server.port, "/health", Origin="http://b.example")[1]
        assert get(closed.port, "/v1/completions", "OPTIONS", Origin="http://a.example", **asks)[0] == 405
    finally:
        server.stop()
        closed.stop()
        made.drain(5)


def test_every_field_is_in_the_docs():
    import re
    from pathlib import Path

    from forgeattention.serving.fields import FREE, NEUTRAL
    from forgeattention.serving.schema import Chat, Completion

    text = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    section = text.partition("### Fields of a request")[2].partition("\n## ")[0]
    tables, _, rest = section.partition("**Refused**")
    first = {name for row in re.findall(r"^\| (`.*?) \|", tables, re.M) for name in re.findall("`([a-z_]+)`", row)}
    chat_only = {"echo", "best_of"}  # of a chat's schema, for the values that change nothing
    assert first == (set(Chat.model_fields) - chat_only) | set(Completion.model_fields)
    assert set(re.findall("`([a-z_]+)`", rest)) - {"store"} == {*NEUTRAL, *FREE} - {"store"}
