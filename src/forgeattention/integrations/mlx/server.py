"""mlx_lm.server with packed caches, where a bad request ends that request alone."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from queue import Queue
from typing import Any
from weakref import WeakSet

import mlx.core as mx
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from mlx_lm import server
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.utils import load_model

from ... import models
from ...codec import CodecSpec
from .prompt import full_attention, make_prompt_cache, patched
from .warmup import warm_up

log = logging.getLogger("forgeattention")
OURS = ("--model", "--host", "--port", "--kv-bits", "--kv-group-size", "--quantized-kv-start")
"""Arguments of mlx_lm.server that `serve` sets, or that a packed cache replaces."""


class Provider(server.ModelProvider):
    """Loads models; knows the served one by the name that it was given too."""

    def __init__(self, cli_args: Any, *, name: str, spec: CodecSpec, options: dict[str, Any]) -> None:
        super().__init__(cli_args)
        self.name = name
        self._model_map[name] = cli_args.model
        self._warm = functools.partial(make_prompt_cache, spec=spec, **options)

    def _load(self, *args: Any, **kwargs: Any) -> None:
        super()._load(*args, **kwargs)
        if mx.default_device().type == mx.gpu:
            log.info("compiling kernels for %s", self.name)
            warm_up(self.model, functools.partial(self._warm, self.model))


class Generator(server.ResponseGenerator):
    """Generates; what fails is told to the requests that were being served, and the next ones are served again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._taken: WeakSet[Queue[Any]] = WeakSet()
        super().__init__(*args, **kwargs)

    def _next_request(self, timeout: float | None = None) -> Any:
        request = super()._next_request(timeout)
        if request is not None:
            self._taken.add(request[0])
        return request

    def _run_generate(self) -> None:
        while True:  # a server that stops lets `_generate` return
            try:
                self._generate()
                return
            except Exception as error:
                log.exception("generation failed")
                failed = list(self._taken)
                if not failed:  # the model itself cannot be served
                    self._generation_failed = True
                    return
                self._taken.clear()
                self.prompt_cache.trim_to(n_sequences=0)
                for queue in failed:
                    queue.put(RuntimeError(f"generation failed: {error}"))

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        found = super()._tokenize(tokenizer, request, args)
        if not found[0]:
            raise ValueError("expected a prompt of at least one token; got an empty one")
        return found


class _Noting:
    """A generator for one handler, which notes why a request was refused."""

    def __init__(self, generator: Any, handler: Handler) -> None:
        self._generator = generator
        self._handler = handler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._generator.generate(*args, **kwargs)
        except Exception as error:
            self._handler.refusal = error
            raise


class Handler(server.APIHandler):
    """Answers requests; a refusal's status says whose fault it is."""

    refusal: Exception | None = None
    response_generator: Any

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        self.response_generator = _Noting(self.response_generator, self)
        try:
            super().handle_completion(request, stop_words)
        except OSError:  # the client is gone
            raise
        except Exception as error:
            message = json.dumps({"error": str(error)})
            if self.stream:
                self.wfile.write(f"data: {message}\n\ndata: [DONE]\n\n".encode())
                return
            self._headers_buffer: list[bytes] = []  # those of an answer that did not come
            self._answer(500, {"error": str(error)})

    def _set_completion_headers(self, status_code: int = 200) -> None:
        if status_code == 404 and self.refusal is not None:
            mine = isinstance(self.refusal, RuntimeError)
            status_code = 400 if isinstance(self.refusal, ValueError) else 500 if mine else 404
        super()._set_completion_headers(status_code)

    def _answer(self, status: int, body: Any) -> None:
        text = json.dumps(body).encode()
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
        self.wfile.flush()

    def handle_models_request(self) -> None:
        """The served model, and those of the hub's cache that mlx-lm could load."""
        names = [self.response_generator.model_provider.name]
        try:
            files = {"config.json", "model.safetensors.index.json", "tokenizer_config.json"}
            for repo in scan_cache_dir().repos:
                main = repo.refs.get("main") if repo.repo_type == "model" else None
                if main is not None and files <= {file.file_path.name for file in main.files}:
                    names.append(repo.repo_id)
        except CacheNotFound:
            pass
        entries = [{"id": name, "object": "model", "created": self.created} for name in dict.fromkeys(names)]
        if wanted := self.path.partition("?")[0].removeprefix("/v1/models").strip("/"):
            found = [entry for entry in entries if entry["id"].strip("/") == wanted]
            self._answer(
                200 if found else 404, found[0] if found else {"error": f"model {wanted!r} is not served here"}
            )
            return
        self._answer(200, {"object": "list", "data": entries})


def serve(
    model: str | os.PathLike[str],
    spec: CodecSpec | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    arguments: Sequence[str] = (),
    **options: Any,
) -> None:
    """Runs mlx_lm.server with packed caches until it is stopped.

    Args:
        model: as for `forgeattention.models.load`; clients may name it so too.
        spec: how caches are coded.
        host, port: where it listens.
        arguments: more arguments of mlx_lm.server, such as ["--max-tokens", "512"].
        options: as for `make_prompt_cache`.

    Raises:
        ValueError: a model that cannot be packed, or an argument that a packed cache has no use for.
    """
    for argument in arguments:
        if argument.partition("=")[0] in OURS:
            raise ValueError(f"[serve] expected no {argument.partition('=')[0]} for a server of packed caches; got it")
    name, spec = models.served_name(model), CodecSpec() if spec is None else spec
    location = models.folder(model)
    if Path(location).is_dir():
        # Nothing is read of the weights: a model that cannot be served is refused at once.
        full_attention(load_model(Path(location), lazy=True)[0])

    def run(host: str, port: int, provider: Any) -> None:
        generator = Generator(provider, LRUPromptCache(provider.cli_args.prompt_cache_size))
        if mx.distributed.init().rank() == 0:
            server._run_http_server(host, port, generator, handler_class=Handler)
        else:
            generator.join()

    provider = functools.partial(Provider, name=name, spec=spec, options=options)
    before = sys.argv, server.ModelProvider, server.run
    sys.argv = ["mlx_lm.server", "--model", location, "--host", host, "--port", str(port), *arguments]
    server.ModelProvider, server.run = provider, run
    try:
        with patched(spec, **options):
            server.main()
    finally:
        sys.argv, server.ModelProvider, server.run = before
