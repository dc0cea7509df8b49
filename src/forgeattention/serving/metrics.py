"""Counters of the server, in Prometheus form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from .engine import Engine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """What `/metrics` shows; gauges read the engine when asked."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"forgeattention_{name}", text, labels, registry=self.registry)

        self._requests = counter("requests", "Requests that ended, by how", ("finish",))
        self._refused = counter("refused", "Requests that were refused, by status", ("status",))
        self._prompt = counter("prompt_tokens", "Tokens of prompts")
        self._cached = counter("prefix_hit_tokens", "Tokens of prompts that came from kept prefixes")
        self._new = counter("generated_tokens", "New tokens")
        self._first = Histogram(
            "forgeattention_first_token_seconds", "Arrival to first token", buckets=SECONDS, registry=self.registry
        )
        self._whole = Histogram(
            "forgeattention_request_seconds", "Arrival to end", buckets=SECONDS, registry=self.registry
        )
        for name, text, read in (
            ("running", "Requests being read or decoded", lambda: engine.running),
            ("waiting", "Requests that wait", lambda: engine.waiting),
            ("pages_in_use", "Pages in use, of one layer", lambda: engine.pages_in_use),
            ("pages", "Pages there may be, of one layer", lambda: engine.max_pages),
            ("prefixes", "Prefixes kept in memory", lambda: len(engine.prefixes)),
        ):
            Gauge(f"forgeattention_{name}", text, registry=self.registry).set_function(read)

    def prompt(self, tokens: int, cached: int) -> None:
        self._prompt.inc(tokens)
        self._cached.inc(cached)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def finished(self, finish: str, tokens: int, seconds: float) -> None:
        self._requests.labels(finish).inc()
        self._new.inc(tokens)
        self._whole.observe(seconds)

    def refused(self, status: int) -> None:
        self._refused.labels(str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
