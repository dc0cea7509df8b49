"""Continuous batching over one packed page pool: requests enter and leave between any two steps."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..codec import PAGE, CodecSpec
from ..integrations.hf.cache import ForgeCache
from .metrics import Metrics
from .prefix import PrefixCache
from .request import Busy, Event, Request
from .sampling import Sampler, Scored, score
from .text import TextStream, end_tokens

log = logging.getLogger("forgeattention")


class Engine:
    """Reads prompts in pieces and decodes all running requests together, in a thread of its own.

    A request is admitted when the pool has pages for all of its tokens, so that none fails midway for want of room;
    kept prefixes are given up first.

    Args:
        model: a transformers model with attn_implementation="forge" whose layers can all be packed.
        tokenizer: the model's fast tokenizer.
        spec: how caches are coded.
        max_pages: pages of a layer for all requests and kept prefixes.
        max_running: most requests decoded together.
        max_waiting: most requests that wait; more are refused.
        piece: tokens of a prompt that are read between two decode steps.
        prefixes: prefixes kept in memory.
        folder, max_disk_bytes: where prefixes outlast the process, and how much they may take.

    Raises:
        ValueError: a model with layers that cannot be packed.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        spec: CodecSpec | None = None,
        *,
        max_pages: int,
        max_running: int = 16,
        max_waiting: int = 64,
        piece: int = 512,
        prefixes: int = 32,
        folder: Path | None = None,
        max_disk_bytes: int = 0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_pages = max_pages
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.piece = piece
        self.draining = False
        text = model.config.get_text_config(decoder=True)
        self.max_length = min(int(text.max_position_embeddings), max_pages * PAGE)
        self.vocabulary = int(text.vocab_size)
        self.ends = end_tokens(model, tokenizer)
        self._spec = spec
        self._root = ForgeCache(model, spec, max_pages=max_pages, graph=False)
        if len(self._root.packed) != len(self._root.layers):
            raise ValueError(
                f"[serve] expected a model whose {len(self._root.layers)} layers can all be packed; got "
                f"{len(self._root.packed)} of the stock full-attention kind"
            )
        with torch.inference_mode():  # makes the pools, which every request's cache then shares
            self._step([[0]], [0], self._root)
        for layer in self._root.layers:
            layer.crop(-1)
        self._pool = self._root.layers[0].cache.pool
        self.prefixes = PrefixCache(piece, prefixes, folder, max_disk_bytes, self._read_saved)
        self.metrics = Metrics(self)
        self._waiting: deque[Request] = deque()
        self._reading: deque[Request] = deque()
        self._running: list[Request] = []
        self._batch: ForgeCache | None = None
        self._wake = threading.Condition()
        self._ended = self._failed = self._hurried = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._failed

    @property
    def running(self) -> int:
        return len(self._running) + sum(len(request.answers) for request in [*self._reading])

    @property
    def waiting(self) -> int:
        return sum(len(request.answers) for request in [*self._waiting])

    @property
    def pages_in_use(self) -> int:
        return self._pool.in_use

    def check_room(self, count: int) -> None:
        """Whether that many more answers may wait now.

        Raises:
            ValueError: more than may ever wait together, or be decoded together.
            Busy: too many are waiting, or the engine is ending or has failed.
        """
        if count > self.max_waiting:
            raise ValueError(f"[serve] expected at most {self.max_waiting} answers per request; got {count}")
        if self.draining or not self.alive:
            raise Busy("the server is ending" if self.draining else "the engine has failed", 30)
        if self.waiting + count > self.max_waiting:
            raise Busy(f"{self.waiting} requests are waiting", 1 + self.waiting // self.max_running)

    def submit(self, *requests: Request) -> None:
        """Queues requests, all of them or none.

        Raises:
            ValueError: a prompt that is empty, or with its answer too long for the model or the pool; or more answers
                than may wait or run together.
            Busy: too many are waiting, or the engine is ending or has failed.
        """
        for request in requests:
            total = len(request.prompt) + request.sampling.max_tokens
            if not request.prompt:
                raise ValueError("[serve] expected a prompt; got an empty one")
            if total > self.max_length or request.pages > self.max_pages:
                raise ValueError(
                    f"[serve] expected at most {self.max_length} tokens of prompt and answer; "
                    f"got {len(request.prompt)} and {request.sampling.max_tokens}"
                )
            if len(request.answers) > self.max_running or request.growth > self.max_pages:
                raise ValueError(
                    f"[serve] expected at most {self.max_running} answers to a prompt, of {self.max_pages} pages "
                    f"together; got {len(request.answers)} of {request.growth}"
                )
        with self._wake:
            self.check_room(sum(len(request.answers) for request in requests))
            self._waiting.extend(requests)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        """Ends a request at the next step."""
        with self._wake:
            request.cancelled = True
            self._wake.notify()

    def drain(self, seconds: float) -> int:
        """Refuses new requests, ends the others as they finish or after `seconds`, keeps the prefixes on disk.

        Returns:
            Requests that were cut short.
        """
        with self._wake:
            self.draining = True
            self._wake.notify()
        deadline = time.monotonic() + seconds
        while self.alive and self.running + self.waiting and time.monotonic() < deadline and not self._hurried:
            time.sleep(0.02)
        left = self._everyone()
        for request in left:
            self.cancel(request)
        with self._wake:
            self._ended = True
            self._wake.notify()
        self._thread.join()
        self.prefixes.persist(self.model)
        return sum(request.finish == "cancelled" for request in left)

    def hurry(self) -> None:
        """Lets a `drain` under way wait no longer."""
        self._hurried = True

    def _everyone(self) -> list[Request]:
        queued = [*self._waiting, *self._reading]
        # A request may stand in two places while it moves from one to the next.
        return list(dict.fromkeys([*(answer for request in queued for answer in request.answers), *self._running]))

    def _loop(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            log.critical("the engine ends, and all of its requests", exc_info=True)
            with self._wake:  # from here on `submit` refuses
                self._failed = True
                left = self._everyone()
                self._waiting.clear()
                self._reading.clear()
                self._running, self._batch = [], None
            for request in left:
                with contextlib.suppress(Exception):  # whatever is wrong with one, the others are told
                    self._end(request, "error", error=f"the engine has failed: {type(error).__name__}: {error}")

    def _serve(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._reading or self._running or self._ended):
                    self._wake.wait()
                if self._ended and not (self._waiting or self._reading or self._running):
                    return
            with torch.inference_mode():
                self._drop_cancelled()
                self._admit()
                if self._reading:
                    self._guard(self._reading[0].answers, self._read_piece)
                if self._running:
                    self._guard(tuple(self._running), self._decode)

    def _guard(self, requests: Sequence[Request], action: Callable[[], None]) -> None:
        """Runs a step; should it fail, the requests in it end with an error and the others go on."""
        try:
            action()
        except Exception as error:
            log.exception("a step with %d requests failed", len(requests))
            for request in requests:
                self._end(request, "error", error=f"{type(error).__name__}: {error}")
            if self._reading and requests[0] is self._reading[0]:
                self._reading.popleft()
                self._leave([r for r in self._running if r in requests], None)
            else:
                self._running, self._batch = [], None

    def _drop_cancelled(self) -> None:
        for queue in (self._waiting, self._reading):
            with self._wake:  # a deque must not grow while it is looked through
                gone = [r for r in queue if r.cancelled]
                for request in gone:
                    queue.remove(request)
            for request in gone:
                for answer in request.answers:
                    self._end(answer, "cancelled")
        self._leave([r for r in self._running if r.cancelled], "cancelled")

    def _admit(self) -> None:
        while self._waiting and self.running + len(self._waiting[0].answers) <= self.max_running:
            request = self._waiting[0]
            growth = sum(r.growth for r in (*self._reading, *self._running, request))
            while self._pool.in_use + growth > self.max_pages and self.prefixes.drop_oldest():
                pass
            if self._pool.in_use + growth > self.max_pages:
                return
            for answer in request.answers:
                answer.sampler = Sampler(answer.sampling, answer.prompt, self.ends, answer.grammar)
                answer.text = TextStream(self.tokenizer, answer.sampling.stop)
            # A prompt whose tokens are to be scored is read whole.
            known = (0, None) if request.sampling.score_prompt else self.prefixes.get(request.prompt)
            request.cached, cache = known
            request.cache, request.read = cache or self._root.fork(), request.cached
            self.metrics.prompt(len(request.prompt), request.cached)
            self._reading.append(request)
            self._waiting.popleft()  # last, so that `drain` and a failure always see the request somewhere

    def _read_piece(self) -> None:
        request = self._reading[0]
        assert request.cache is not None
        end = min(len(request.prompt), request.read + self.piece)
        tokens = request.prompt[request.read : end]
        if request.sampling.score_prompt:
            logits = self._score_piece(request, tokens)
        else:
            logits = self._step([tokens], [request.read], request.cache)
        request.read = end
        sound = self._sound(logits)
        # What is not sound must not reach another request through a kept prefix.
        if sound[0] and end % self.piece == 0:
            self.prefixes.put(request.prompt[:end], request.cache)
        if end < len(request.prompt):
            return
        for answer in request.copies:
            answer.cache, answer.read, answer.cached = request.cache.fork(), end, request.cached
        for answer in request.answers:
            if answer.cancelled:
                self._end(answer, "cancelled")
            elif not self._take(answer, logits[0], sound[0]):
                assert answer.cache is not None
                if self._batch is None:
                    self._batch = answer.cache
                else:
                    self._batch.join(answer.cache)
                self._running.append(answer)
            answer.cache = None
        self._reading.popleft()  # last, so that `drain` always sees the request somewhere
        request.copies = ()  # from here on each stands for itself

    def _score_piece(self, request: Request, tokens: list[int]) -> torch.Tensor:
        """Reads a piece of a prompt and scores the tokens after its own; the logits [1, vocabulary] after it."""
        assert request.cache is not None
        top = request.sampling.logprobs or 0
        logits = self._logits([tokens], [request.read], request.cache, len(tokens))[0]
        after = request.prompt[request.read + 1 : request.read + len(tokens) + 1]
        if request.read == 0:
            request.scores.append(Scored(tokens[0]))
        request.scores.extend(score(logits[: len(after)], after, top))
        return logits[-1:]

    def _decode(self) -> None:
        assert self._batch is not None
        logits = self._step([[r.new[-1]] for r in self._running], [r.read for r in self._running], self._batch)
        done = []
        for request, row, sound in zip(self._running, logits, self._sound(logits)):
            request.read += 1
            if self._take(request, row, sound):
                done.append(request)
        self._leave(done, None)

    @staticmethod
    def _sound(logits: torch.Tensor) -> list[bool]:
        """Which rows of the logits [batch, vocabulary] are numbers."""
        return logits.amax(-1).isfinite().tolist()

    def _leave(self, requests: list[Request], finish: str | None) -> None:
        """Takes requests out of the running batch; `finish` where they have not been told yet."""
        if not requests:
            return
        rows = [i for i, r in enumerate(self._running) if r not in requests]
        self._running = [self._running[i] for i in rows]
        if rows:
            assert self._batch is not None
            self._batch.reorder_cache(torch.tensor(rows))
        else:
            self._batch = None
        if finish is not None:
            for request in requests:
                self._end(request, finish)

    def _take(self, request: Request, logits: torch.Tensor, sound: bool) -> bool:
        """Draws a request's next token and tells its listener; whether it was the last one. What goes wrong here is
        this request's own."""
        try:
            if not sound:
                raise ValueError("the model gave logits that are no numbers")
            return self._next(request, logits)
        except Exception as error:
            log.exception("a token of a request could not be drawn")
            return self._end(request, "error", error=f"{type(error).__name__}: {error}")

    def _next(self, request: Request, logits: torch.Tensor) -> bool:
        assert request.sampler is not None
        assert request.text is not None
        how = request.sampling
        if how.max_tokens == 0:  # asked for the prompt's scores alone
            return self._end(request, "length")
        token = request.sampler(logits)
        request.new.append(token)
        if how.logprobs is not None:
            request.scores.extend(score(logits[None], [token], how.logprobs))
        if len(request.new) == 1:
            self.metrics.first_token(time.monotonic() - request.arrived)
        if token in how.stop_tokens or (token in self.ends and not how.ignore_eos):
            return self._end(request, "stop", request.text.flush())
        text = request.text.push(token)
        if request.text.stopped:
            return self._end(request, "stop", text)
        if request.grammar is not None and request.grammar.ended:
            return self._end(request, "stop", text + request.text.flush())
        if len(request.new) >= how.max_tokens:
            return self._end(request, "length", text + request.text.flush())
        if text or request.scores:
            request.listener(Event(text, None, len(request.new), scores=request.told()))
        return False

    def _end(self, request: Request, finish: str, text: str = "", error: str = "") -> bool:
        request.cache, request.finish = None, finish
        self.metrics.finished(finish, len(request.new), time.monotonic() - request.arrived)
        request.listener(Event(text, finish, len(request.new), error, request.told()))
        return True

    def _step(self, tokens: list[list[int]], positions: list[int], cache: ForgeCache) -> torch.Tensor:
        """Logits [batch, vocabulary] after tokens [batch, n] that begin at the given positions."""
        return self._logits(tokens, positions, cache, 1)[:, -1]

    def _logits(self, tokens: list[list[int]], positions: list[int], cache: ForgeCache, keep: int) -> torch.Tensor:
        """Logits [batch, keep, vocabulary] after the last `keep` tokens."""
        ids = torch.tensor(tokens, device=self.model.device)
        first = torch.tensor(positions, device=self.model.device)
        at = first[:, None] + torch.arange(ids.shape[1], device=ids.device)
        out = self.model(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        return out.logits[:, -keep:]

    def _read_saved(self, path: Path) -> ForgeCache:
        """A saved prefix, with its pages in the engine's own pool."""
        cache = self._root.fork([])
        cache.join(ForgeCache.load(path, self.model, self._spec))
        return cache
