"""An engine over a model of random weights, requests to it, and an application over it."""

from __future__ import annotations

import threading
import time
from typing import Any

import tiny
import uvicorn

from forgeattention import CodecSpec
from forgeattention.serving.engine import Engine, Event, Request
from forgeattention.serving.sampling import Sampling

SPEC = CodecSpec(window=16, k_code="scalar", refine=False)
PIECE = 64


def model() -> Any:
    made = tiny.llama(head_dim=64, hidden_size=64, attn_implementation="forge", max_position_embeddings=4096).float()
    made.generation_config.eos_token_id = None
    return made


def engine(made: Any, **options: Any) -> Engine:
    return Engine(made, tiny.tokenizer(), SPEC, **{"max_pages": 64, "piece": PIECE, **options})


class Asked:
    """A request under way."""

    def __init__(self, engine: Engine, prompt: list[int], **sampling: Any) -> None:
        self.events: list[Event] = []
        self.done = threading.Event()
        self.some = threading.Event()
        self.request = Request(prompt, Sampling(**{"max_tokens": 12, **sampling}), self._listen)
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
