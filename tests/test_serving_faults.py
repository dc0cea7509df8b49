"""The server ended, killed, and with an engine that fails: clients are told, and a restart gives the same answers."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from server_process import CLI, Server
from serving_engine import Asked, Running, engine, model, post, tokenizer

from forgeattention.serving.api import create_app
from forgeattention.serving.request import Request
from forgeattention.serving.sampling import Sampling

PROMPT = "prefix " * 30
CUT = (
    """
import os, signal
from forgeattention.util import tensor_files

whole, written = tensor_files.save_file, []

def half(tensors, path, metadata):
    whole(tensors, path, metadata)
    written.append(path)
    if len(written) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

tensor_files.save_file = half
"""
    + CLI
)
"""The server, killed when half of the second prefix is written."""


def connect(port: int) -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)


def fails(made: Any) -> threading.Event:
    """Makes the engine's thread fail outside of any request's step, once the event is set."""
    now, real = threading.Event(), made._drop_cancelled

    def failing() -> None:
        if now.is_set():
            raise RuntimeError("a planted fault")
        real()

    made._drop_cancelled = failing
    return now


def test_clients_of_a_failing_engine_are_told():
    made = engine(model())
    now, server = fails(made), Running(create_app(made, "tiny"))
    try:
        with connect(server.port) as client:
            stream = client.completions.create(model="tiny", prompt="x", max_tokens=2000, stream=True)
            next(iter(stream))
            now.set()
            with pytest.raises(openai.APIError, match="a planted fault"):
                list(stream)
            with pytest.raises(openai.InternalServerError, match="the engine has failed") as refused:
                client.completions.create(model="tiny", prompt="x", max_tokens=3)
            assert refused.value.status_code == 503
        with pytest.raises(urllib.error.HTTPError) as health:
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health")
        assert health.value.code == 503
        assert health.value.read() == b'{"status":"failed"}'
    finally:
        server.stop()


def test_requests_may_arrive_while_the_queue_is_looked_through():
    made = engine(model(), max_running=1)
    asked, extra = [], []

    class Late(Request):
        """Whose queue grows as soon as the engine looks at it."""

        @property
        def cancelled(self) -> bool:
            if threading.current_thread().name == "engine" and not extra:
                extra.append(threading.Thread(target=lambda: asked.append(Asked(made, [98] * 5))))
                extra[0].start()
                extra[0].join(0.3)
            return False

        @cancelled.setter
        def cancelled(self, value: bool) -> None:
            pass

    first, told = Asked(made, [97] * 5, max_tokens=60), threading.Event()
    assert first.some.wait(60)
    made.submit(Late([99] * 5, Sampling(3), lambda event: told.set() if event.finish else None))
    assert told.wait(60)
    extra[0].join(60)
    assert asked[0].wait().finish == first.wait().finish == "length"
    made.drain(5)


@pytest.fixture
def served(tmp_path: Path) -> Any:
    folder, prefixes = tmp_path / "model", tmp_path / "prefixes"
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    options = ["--cache-memory", "8MB", "--piece", "64", "--prefix-folder", str(prefixes)]
    with contextlib.ExitStack() as started:

        def start(code: str = CLI, more: Sequence[str] = ()) -> Server:
            made = Server(str(folder), tmp_path / "log", [*options, *more], engine="hf", code=code)
            started.callback(made.stop)
            return made.wait(120)

        yield start, prefixes, tmp_path / "log"


def test_sigterm_lets_requests_finish(served, monkeypatch):
    """A request under way is answered whole, and its prefix is on disk afterwards."""
    monkeypatch.setenv("FORGEATTENTION_API_KEY", "none")
    start, prefixes, log = served
    server = start()
    with connect(server.port) as client:
        stream = client.completions.create(model="model", prompt=PROMPT, max_tokens=200, stream=True)
        first = next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        chunks = [first, *stream]
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    assert server.process.wait(60) == 0
    assert "0 requests were cut short" in log.read_text()
    assert len(list(prefixes.glob("*.forgecache"))) == len(PROMPT) // 64


def test_sigterm_tells_those_that_are_cut(served):
    """New requests get 503 while others run on; what --drain cuts short is told so, and counted."""
    start, _, log = served
    server = start(more=["--drain", "3"])
    body = {"prompt": "abc", "max_tokens": 4000, "ignore_eos": True}
    answers: list[Any] = []

    def whole() -> None:
        answers.append(post(server.port, "/v1/completions", body))

    asking = threading.Thread(target=whole)
    asking.start()
    with connect(server.port) as client:
        events = client.completions.create(
            model="model", prompt="abc", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(events))
        while server.metric("forgeattention_running") < 2:
            time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        status, headers, answer = post(server.port, "/v1/completions", {"prompt": "x"})
        assert (status, answer["error"]["code"]) == (503, "unavailable")
        assert int(headers["retry-after"]) >= 1
        with pytest.raises(openai.APIError, match="the server is ending"):
            list(events)
    asking.join(60)
    status, headers, answer = answers[0]
    assert status == 503, answer
    assert answer["error"]["message"] == "the server is ending"
    assert int(headers["retry-after"]) >= 1
    assert server.process.wait(60) == 0
    assert "2 requests were cut short" in log.read_text()


def test_a_second_signal_waits_no_longer(served):
    start, _, log = served
    server = start(more=["--drain", "600"])
    with connect(server.port) as client:
        events = client.completions.create(
            model="model", prompt="abc", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(events))
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server is ending"):
            list(events)
    assert server.process.wait(60) == 0
    assert "1 requests were cut short" in log.read_text()


def ask(server: Server, prompt: str) -> tuple[str, int]:
    with connect(server.port) as client:
        answer = client.completions.create(model="model", prompt=prompt, max_tokens=20, temperature=0)
    return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens


def test_a_killed_server_loses_nothing_that_was_whole(served):
    start, prefixes, log = served
    first, other = start(), PROMPT[:128] + "other"
    want, want_other = ask(first, PROMPT), None
    with connect(first.port) as client:
        stream = client.completions.create(model="model", prompt="y", max_tokens=2000, stream=True)
        next(iter(stream))
        first.process.send_signal(signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(openai.APIConnectionError):
            list(stream)
        assert time.monotonic() - begun < 10, "the client need not wait"
    assert list(prefixes.iterdir()) == [], "prefixes are written when the server ends"

    second = start(CUT)
    assert ask(second, PROMPT) == want
    want_other = ask(second, "no shared beginning")[0]
    second.process.terminate()
    assert second.process.wait(60) == -signal.SIGKILL
    whole, part = sorted(prefixes.iterdir(), key=lambda path: path.suffix)
    assert (whole.suffix, part.suffix) == (".forgecache", ".part")
    # What a disk may keep that lost its last blocks: half a file under its own name.
    half = prefixes / (part.name.removeprefix(".").partition(".forgecache")[0] + ".forgecache")
    half.write_bytes(part.read_bytes())

    third = start()
    assert not part.exists()
    assert ask(third, PROMPT) == (want[0], 192), "the whole prefix is used"
    assert ask(third, "no shared beginning")[0] == want_other
    assert ask(third, other)[1] == 0, "the damaged one is not"
    assert not half.exists()
    assert f"{half} is not used and was removed" in log.read_text()
