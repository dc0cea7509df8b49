"""The HTTP side, over real sockets, with the openai client and with what no good client sends."""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import content_type_conformance, not_a_server_error, status_code_conformance
from serving_engine import Running, engine, model, post

from forgeattention.serving.api import create_app

KEY = "a-key"


@pytest.fixture(scope="module")
def made() -> Any:
    engine_ = engine(model(), max_pages=40, max_running=8, max_waiting=4)
    yield engine_
    engine_.drain(5)


@pytest.fixture(scope="module")
def running(made) -> Any:
    server = Running(create_app(made, "tiny", api_key=KEY, max_body=1 << 16))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(running) -> Any:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def test_chat_completions(client):
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=9, temperature=0
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 9
    assert answer.usage.prompt_tokens == len("hello>")
    parts = client.completions.create(model="tiny", prompt="hello>", max_tokens=9, temperature=0)
    assert parts.choices[0].text == answer.choices[0].message.content


def test_streaming_gives_the_same_text(client):
    options: dict[str, Any] = {"model": "tiny", "prompt": "some text", "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == 30
    assert chunks[-2].choices[0].finish_reason == "length"
    stop = whole.choices[0].text[3:5]
    cut = client.completions.create(**options, stop=[stop])
    assert cut.choices[0].text == whole.choices[0].text[: whole.choices[0].text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_a_shared_prefix_is_read_once(client):
    prompt = "a long beginning, " * 20
    first = client.completions.create(model="tiny", prompt=prompt + "one", max_tokens=5)
    second = client.completions.create(model="tiny", prompt=prompt + "two", max_tokens=5)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == len(prompt) // 64 * 64


def test_many_clients_at_once(client):
    client = client.with_options(max_retries=9)  # five requests too many to wait: the client comes back as told

    def ask(i: int) -> str:
        made = client.completions.create(model="tiny", prompt=f"client {i}", max_tokens=20, temperature=0)
        return made.choices[0].text

    lone = [ask(i) for i in range(12)]
    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(ask, range(12))) == lone


def test_more_than_may_wait_get_429(client, made, running):
    streams = []

    def ask() -> None:
        for _ in range(8):
            streams.append(client.completions.create(model="tiny", prompt="x", max_tokens=2000, stream=True))

    # The pool has room for one such answer at a time; four more may wait.
    with pytest.raises(openai.RateLimitError) as refused:
        ask()
    assert 1 <= len(streams) <= 6
    assert int(refused.value.response.headers["retry-after"]) >= 1
    for stream in streams:
        stream.close()
    for _ in range(600):
        if not made.running + made.waiting:
            break
        time.sleep(0.05)
    assert made.running == made.waiting == 0, "clients that go away end their requests"
    assert client.completions.create(model="tiny", prompt="x", max_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"{", 400, "JSON"),
        (b"[]", 400, "body"),
        ({"model": "tiny"}, 400, "prompt"),
        ({"model": "tiny", "prompt": ""}, 400, "[serve] expected a prompt"),
        ({"model": "tiny", "prompt": []}, 400, "prompt"),
        ({"model": "tiny", "prompt": [999]}, 400, "expected tokens under 257"),
        ({"model": "other", "prompt": "x"}, 404, "model: expected 'tiny'"),
        ({"model": "tiny", "prompt": "x" * 3000, "max_tokens": 10}, 400, "expected at most 2560 tokens"),
        ({"model": "tiny", "prompt": "x", "temperature": 3}, 400, "temperature"),
        ({"model": "tiny", "prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ({"model": "tiny", "prompt": "x", "n": 0}, 400, "n:"),
        ({"model": "tiny", "prompt": "x", "logprobs": 21}, 400, "logprobs:"),
        ({"model": "tiny", "prompt": "x", "stop": [""]}, 400, "stop"),
        ({"model": "tiny", "prompt": "x" * (1 << 17)}, 413, "at most 65536 bytes"),
    ],
)
def test_what_cannot_be_answered_is_refused(running, body, status, text):
    got, _, answer = post(running.port, "/v1/completions", body, key=KEY)
    assert got == status, answer
    assert text in answer["error"]["message"]


def test_a_body_without_a_length_is_bounded_too(running):
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    pieces = (b"x" * 8192 for _ in range(64))
    connection.request("POST", "/v1/completions", pieces, {"Authorization": f"Bearer {KEY}"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize("key", [None, "", "a-ke", "a-key-", "ä"])
def test_the_key_is_asked_for(running, key):
    key = None if key is None else key.encode().decode("latin-1")
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, _, answer = post(running.port, path, {"model": "tiny", "prompt": "x"}, key=key)
        assert status == 401
        assert answer["error"]["code"] == "invalid_api_key"


def test_health_models_and_metrics(client, running):
    assert [m.id for m in client.models.list()] == ["tiny"]
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {"status": "ok"}
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    for name in ("requests_total", "prefix_hit_tokens_total", "first_token_seconds_bucket", "pages_in_use", "waiting"):
        assert f"forgeattention_{name}" in text
    connection.close()


def test_nothing_that_the_schema_describes_breaks_it(made):
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(made, "tiny"))
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 6
    checks = [not_a_server_error, content_type_conformance, status_code_conformance]
    answered = set()

    def call(case: Any) -> None:
        if case.path.endswith("{model}") and len(case.path_parameters["model"]) % 2:
            case.path_parameters["model"] = "tiny"
        if isinstance(case.body, dict) and isinstance(case.body.get("model", "tiny"), str | None):
            case.body |= {"model": "tiny", "max_tokens": 3}
            if isinstance(case.body.get("max_completion_tokens"), int):
                case.body["max_completion_tokens"] = 3
            plain = {"model", "max_tokens", "temperature", "top_p", "seed", "user", "logprobs", "ignore_eos"}
            if isinstance(case.body.get("messages"), list) and len(case.body["messages"]) % 2:
                # The schema cannot say which messages go together; these do.
                case.body = {name: value for name, value in case.body.items() if name in plain}
                case.body["messages"] = [{"role": "user", "content": "hello"}]
        answered.add((case.path, case.call_and_validate(checks=checks).status_code))

    for operation in operations:
        quick = settings(
            max_examples=15, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        quick(given(case=operation.as_strategy())(call))()
    assert {path for path, status in answered if status == 200} == {operation.path for operation in operations}
