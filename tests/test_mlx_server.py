"""mlx_lm.server with packed caches: what one request does wrong is that request's own trouble."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx.utils import tree_flatten  # noqa: E402
from mlx_families import build  # noqa: E402
from tiny import tokenizer  # noqa: E402

from forgeattention.integrations.mlx import server  # noqa: E402


def folder(path: Path, kind: str) -> Path:
    """A tiny model of mlx-lm's as a folder that its server loads."""
    path.mkdir()
    made = build(kind, vocab_size=257)
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(made.parameters())))
    (path / "config.json").write_text(json.dumps(vars(made.args)))
    tokenizer().save_pretrained(path)
    return path


class Server:
    def __init__(self, port: int, name: str) -> None:
        self.url, self.name = f"http://127.0.0.1:{port}", name

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read().decode()
                return answer.status, text if body and body.get("stream") else json.loads(text)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read().decode())

    def complete(self, prompt: str, **fields: Any) -> tuple[int, Any]:
        return self.ask("/v1/completions", {"prompt": prompt, "max_tokens": 3, "temperature": 0.0, **fields})


@pytest.fixture(scope="module")
def running(tmp_path_factory: Any) -> Iterator[Server]:
    path = folder(tmp_path_factory.mktemp("models") / "tiny", "llama")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = path.parent / "log"
    code = (
        "import sys; from forgeattention.integrations.mlx.server import serve;"
        "from forgeattention.codec import CodecSpec;"
        "serve(sys.argv[1], CodecSpec(refine=False, k_code='scalar', v_code='scalar'), port=int(sys.argv[2]))"
    )
    # a hub's cache that does not exist, and no network
    env = {**os.environ, "HF_HUB_CACHE": str(path.parent / "none"), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", code, str(path), str(port)], env=env, stderr=out, stdout=out)
    made = Server(port, str(path))
    try:
        for _ in range(240):
            if process.poll() is not None:
                raise AssertionError(log.read_text())
            try:
                made.ask("/health")
                break
            except OSError:
                time.sleep(0.25)
        yield made
    finally:
        process.kill()
        process.wait()


def test_the_served_model_is_listed_and_known_by_its_name(running: Server) -> None:
    status, listed = running.ask("/v1/models")
    assert (status, [entry["id"] for entry in listed["data"]]) == (200, [running.name])
    assert running.ask(f"/v1/models/{running.name}")[1]["id"] == running.name
    assert running.ask("/v1/models/other")[0] == 404
    status, answer = running.complete("abc", model=running.name)
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_refused_and_the_next_one_served(running: Server, stream: bool) -> None:
    _, want = running.complete("abc")
    status, refusal = running.complete("", stream=stream)
    assert status == 400
    assert "expected a prompt of at least one token" in refusal["error"]
    status, _ = running.complete("abc", model="owner/none")
    assert status in (400, 404)
    assert running.complete("abc")[1]["choices"] == want["choices"]
    assert running.ask("/health")[1] == {"status": "ok"}


def test_a_model_that_cannot_be_packed_is_refused_for_that_request(running: Server, tmp_path: Path) -> None:
    other = folder(tmp_path / "gemma2", "gemma2")
    status, refusal = running.complete("abc", model=str(other))
    assert status == 400, refusal
    assert "expected a model that leaves its keys to mlx-lm's attention; got gemma2" in refusal["error"]
    assert running.complete("abc")[0] == 200


def test_what_fails_in_the_loop_ends_the_requests_being_served_alone() -> None:
    class Flaky(server.Generator):
        def __init__(self) -> None:
            self.turns = 0
            super().__init__(Provider(), server.LRUPromptCache())

        def _generate(self) -> None:
            self.turns += 1
            while not self._stop:
                request = self._next_request(timeout=0.05)
                if request is not None and self.turns == 1:
                    raise ZeroDivisionError("in a step")
                if request is not None:
                    request[0].put("context")

    class Provider:
        cli_args = None

    made = Flaky()
    try:
        with pytest.raises(RuntimeError, match="generation failed: in a step"):
            made.generate(None, None)
        assert made.generate(None, None)[0] == "context"
        assert made.is_healthy
    finally:
        made.stop_and_join()


def test_refused_before_anything_is_served(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[serve\] expected no --kv-bits for a server of packed caches"):
        server.serve("owner/name", arguments=["--kv-bits", "4"])
    path = folder(tmp_path / "model", "deepseek_v3")
    with pytest.raises(ValueError, match=r"\[mlx_lm\] expected a model that leaves its keys .* got deepseek_v3"):
        server.serve(str(path))
