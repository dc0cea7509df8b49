"""The OpenAI-compatible server with packed caches, asked by the openai package's client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.server_process import Server

ARGUMENTS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "16"]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def server(log: Path) -> Iterator[Server]:
    made = Server("smollm2", log, ARGUMENTS)
    try:
        yield made.wait()
    finally:
        made.stop()


def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0)


def ask(server: Server, prompt: str, **options: Any) -> Any:
    return client(server).completions.create(model="smollm2", prompt=prompt, temperature=0, **options)


def test_chat_streams_what_it_also_says_at_once(server: Server) -> None:
    assert [m.id for m in client(server).models.list().data] == ["smollm2"]
    options: Any = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 24,
    }
    whole = client(server).chat.completions.create(**options).choices[0].message.content
    pieces = [c.choices[0].delta.content or "" for c in client(server).chat.completions.create(**options, stream=True)]
    assert len(pieces) > 3
    assert "".join(pieces) == whole
    assert "Paris" in whole


def test_sixteen_clients_share_a_long_prefix(server: Server, text: str) -> None:
    shared = text[:6400]
    first = ask(server, shared, max_tokens=1)
    assert first.usage.prompt_tokens >= 1500
    asked, hit = (server.metric(f"vllm:prefix_cache_{x}_total") for x in ("queries", "hits"))
    prompts = [f"{shared}\n\nQuestion {i}: who is named above? Answer:" for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda p: ask(server, p, max_tokens=12), prompts))
    assert all(a.usage.completion_tokens == 12 or a.choices[0].finish_reason == "stop" for a in answers)
    rate = (server.metric("vllm:prefix_cache_hits_total") - hit) / (
        server.metric("vllm:prefix_cache_queries_total") - asked
    )
    print(f"prefix cache: {rate:.1%} of the tokens asked for")
    assert rate > 0.9
    alone = ask(server, prompts[3], max_tokens=12)
    assert alone.choices[0].text == answers[3].choices[0].text


def test_cancelled_requests_leave_nothing_behind(server: Server, text: str) -> None:
    for i in range(4):
        stream = ask(server, text[1000 * i : 1000 * i + 1500], max_tokens=400, stream=True)
        next(iter(stream))
        stream.close()
    end = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") and time.monotonic() < end:
        time.sleep(0.5)
    assert server.metric("vllm:num_requests_running") == server.metric("vllm:num_requests_waiting") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_an_over_long_prompt_is_a_clean_400(server: Server, text: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(server, text[:20000], max_tokens=5)
    assert error.value.status_code == 400
    assert "2048" in str(error.value)
    assert ask(server, "The capital of France is", max_tokens=3).choices[0].text.strip().startswith("Paris")


def test_a_restarted_server_says_the_same(server: Server, text: str, log: Path) -> None:
    before = ask(server, text[:3000], max_tokens=16).choices[0].text
    server.stop()
    other = Server("smollm2", log, ARGUMENTS)
    try:
        assert ask(other.wait(), text[:3000], max_tokens=16).choices[0].text == before
    finally:
        other.stop()


def test_a_killed_engine_ends_its_requests_and_the_server(text: str, tmp_path: Path) -> None:
    server = Server("smollm2", tmp_path / "log", ARGUMENTS).wait()
    try:
        stream = iter(ask(server, text[:1500], max_tokens=1500, stream=True))
        next(stream)
        children = psutil.Process(server.process.pid).children(recursive=True)
        (engine,) = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
        engine.kill()
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            for _ in stream:
                pass
        with pytest.raises(openai.APIError):
            ask(server, "The capital of France is", max_tokens=3)
        server.process.wait(60)  # with status 0, which is vLLM's choice
    finally:
        server.stop()
