"""An engine over a model of random weights, requests to it, and an application over it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import tiny
import torch
import uvicorn

from forgeattention import CodecSpec
from forgeattention.serving.api import create_app
from forgeattention.serving.engine import Engine
from forgeattention.serving.request import Event, Request
from forgeattention.serving.sampling import Sampling

SPEC = CodecSpec(window=16, k_code="scalar", refine=False)
PIECE = 64
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9, "temperature": 0}


def model() -> Any:
    made = tiny.llama(head_dim=64, hidden_size=64, attn_implementation="forge", max_position_embeddings=4096).float()
    made.generation_config.eos_token_id = made.config.eos_token_id = None
    return made


def tokenizer() -> Any:
    """The tiny tokenizer without an end token, which a model of random weights would draw now and then."""
    made = tiny.tokenizer()
    made.eos_token = None
    return made


def engine(made: Any, words: Any = None, **options: Any) -> Engine:
    return Engine(made, words or tokenizer(), SPEC, **{"max_pages": 64, "piece": PIECE, **options})


class Asked:
    """A request under way."""

    def __init__(self, engine: Engine, prompt: list[int], grammar: Any = None, **sampling: Any) -> None:
        self.events: list[Event] = []
        self.done = threading.Event()
        self.some = threading.Event()
        self.request = Request(prompt, Sampling(**{"max_tokens": 12, **sampling}), self._listen, grammar)
        engine.submit(self.request)

    def _listen(self, event: Event) -> None:
        self.events.append(event)
        self.some.set()
        if event.finish:
            self.done.set()

    def wait(self) -> Asked:
        assert self.done.wait(60), "the request never ended"
        return self

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def finish(self) -> str | None:
        return self.events[-1].finish


class Running:
    """An application in a thread of its own."""

    def __init__(self, app: Any) -> None:
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)


def served() -> Iterator[Running]:
    """A running application with room for several requests; what a fixture yields from."""
    made = engine(model(), max_pages=60, max_running=8, max_waiting=12)
    server = Running(create_app(made, "tiny"))
    yield server
    server.stop()
    made.drain(5)


def openai_client(server: Running) -> Iterator[openai.OpenAI]:
    """OpenAI's own client of an application; what a fixture yields from."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as made:
        yield made


def post(port: int, path: str, body: Any, key: str | None = None) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), json.loads(text)


def stream(port: int, path: str, body: Any) -> list[str]:
    """The lines of a streamed answer that are not empty."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps(body | {"stream": True}), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200
    lines = [line for line in answer.read().decode().splitlines() if line]
    connection.close()
    return lines


def chunks(lines: list[str]) -> list[Any]:
    """The objects of a streamed answer, which ended as it should."""
    data = [line.removeprefix("data: ") for line in lines if not line.startswith(":")]
    assert data.pop() == "[DONE]"
    return [json.loads(line) for line in data]


def says(made: Engine, tokens: Sequence[int]) -> None:
    """Makes the engine's model say these tokens after every prompt, whatever it is: for one request at a time, whose
    prompt's last piece has at least two tokens."""
    real, steps = made._logits, [0]

    def scripted(read: Any, positions: Any, cache: Any, keep: int) -> torch.Tensor:
        steps[0] = 0 if len(read[0]) > 1 else steps[0] + 1
        logits = torch.full_like(real(read, positions, cache, keep), -5.0)
        logits[:, -1, tokens[min(steps[0], len(tokens) - 1)]] = 5.0
        return logits

    made._logits = scripted  # type: ignore[method-assign]
