"""`forgeattn serve hf` under load: a real server on loopback, asked by the openai package's client.

    python -m benchmarks.serving_hf --output benchmarks/results/serving-hf-cpu-DATE.json
    python -m benchmarks.serving_hf --requests 10000 --output benchmarks/results/serving-hf-memory-cpu-DATE.json

Parts: `load` (tokens/s and time to first token by clients, prompts that share nothing; beside it `generate` of plain
transformers, one prompt after another), `prefix` (clients that share the beginning of their prompts), `exhaustion`
(many more clients than the pool has pages for), `sessions` (how many sequences 1 GiB holds), and with --requests
only memory over so many short requests.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import torch
from transformers import AutoTokenizer, DynamicCache
from transformers.generation.streamers import BaseStreamer

from forgeattention import CodecSpec, models
from forgeattention.codec import PAGE
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.tools.evaluation import texts
from forgeattention.util.environment import environment
from forgeattention.util.files import write_json
from tests import tiny
from tests.server_process import Server

Record = dict[str, Any]


def start(model: str, folder: Path, *arguments: str) -> Server:
    log = folder / f"log-{time.monotonic_ns()}"
    return Server(model, log, list(arguments), engine="hf").wait()


def connect(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=3600, max_retries=0)


def processor_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def ask(api: openai.OpenAI, prompt: list[int], tokens: int) -> Record:
    """One streamed answer: seconds to its first and last text, and what the server says of its tokens."""
    times, usage, text, begun = [], None, "", time.perf_counter()
    options: Any = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    for chunk in api.completions.create(model="smollm2", prompt=prompt, max_tokens=tokens, **options):
        usage = chunk.usage or usage
        if chunk.choices:
            text += chunk.choices[0].text
            times.append(time.perf_counter() - begun)
    if usage is None or usage.prompt_tokens_details is None:
        raise RuntimeError("[serving_hf] expected an answer with its usage; got none")
    return {
        "first": times[0],
        "last": times[-1],
        "text": text,
        "prompt": usage.prompt_tokens,
        "new": usage.completion_tokens,
        "cached": usage.prompt_tokens_details.cached_tokens,
    }


def together(server: Server, prompts: list[list[int]], tokens: int) -> Record:
    """All prompts at once, one client each."""
    api, process = connect(server), psutil.Process(server.process.pid)
    used, begun = processor_seconds(process), time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        out = list(pool.map(lambda prompt: ask(api, prompt, tokens), prompts))
    return {
        "clients": len(prompts),
        **speeds(out, time.perf_counter() - begun, processor_seconds(process) - used),
        "prefix_hit_rate": round(sum(x["cached"] for x in out) / sum(x["prompt"] for x in out), 4),
    }


def speeds(out: list[Record], seconds: float, used: float) -> Record:
    later = [(x["last"] - x["first"]) / (x["new"] - 1) for x in out if x["new"] > 1]
    read, new = sum(x["prompt"] for x in out), sum(x["new"] for x in out)
    return {
        "prompt_tokens": read,
        "new_tokens": new,
        "seconds": round(seconds, 2),
        "all_tokens_per_second": round((read + new) / seconds, 1),
        "output_tokens_per_second": round(new / seconds, 2),
        "seconds_to_first_token": round(statistics.median(x["first"] for x in out), 2),
        "seconds_per_later_token": round(statistics.median(later), 4),
        "processor_seconds": round(used, 2),
    }


class Clock(BaseStreamer):
    """Times of `generate`'s tokens; the first call gives the prompt back."""

    def __init__(self) -> None:
        self.begun, self.times = time.perf_counter(), []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter() - self.begun)

    def end(self) -> None:
        pass


def plain(model: Any, prompt: list[int], tokens: int) -> Record:
    """transformers' own `generate` with its own cache in this process: one prompt, read at once."""
    process, clock = psutil.Process(), Clock()
    used, begun = processor_seconds(process), time.perf_counter()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        options: Any = {"do_sample": False, "max_new_tokens": tokens, "streamer": clock}
        cache = DynamicCache(config=model.config)
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
    times = clock.times[1:]
    one = {"first": times[0], "last": times[-1], "prompt": len(prompt), "new": len(times)}
    return {"clients": 1, **speeds([one], time.perf_counter() - begun, processor_seconds(process) - used)}


class Prompts:
    """Windows of the bundled texts, each of which begins elsewhere, so that two share no prefix."""

    def __init__(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(models.folder("smollm2"))
        self.ids = [i for name in ("genesis", "licences") for i in tokenizer(texts.read(name)).input_ids]
        self._next = 0

    def take(self, count: int, tokens: int) -> list[list[int]]:
        out = []
        for _ in range(count):
            at = self._next * 1009 % (len(self.ids) - tokens)
            out.append(self.ids[at : at + tokens])
            self._next += 1
        return out


def load(folder: Path, args: argparse.Namespace, texts: Prompts, done: Callable[[Record], None]) -> None:
    model, _ = models.load("smollm2", dtype=torch.float32, attn_implementation="sdpa")
    plain(model, texts.take(1, 200)[0], 2)
    server = start("smollm2", folder)
    try:
        together(server, texts.take(1, 200), 2)
        for clients in args.clients:
            prompts = texts.take(clients, args.prompt)
            done({"op": "serve", "cache": "packed", **together(server, prompts, args.tokens)})
            if clients == 1:
                done({"op": "serve", "cache": "transformers", **plain(model, prompts[0], args.tokens)})
    finally:
        server.stop()


def prefix(folder: Path, args: argparse.Namespace, texts: Prompts, done: Callable[[Record], None]) -> None:
    """One client with a new prompt, one that shares its beginning, then 16 that do."""
    for piece in (512, 128):
        server = start("smollm2", folder, "--piece", str(piece))
        try:
            together(server, texts.take(1, 200), 2)
            shared = texts.take(1, args.shared)[0]
            for clients in (1, 1, 16):
                prompts = [shared + own for own in texts.take(clients, 100)]
                about = {"op": "prefix", "piece": piece, "shared_tokens": args.shared}
                done({**about, **together(server, prompts, args.tokens)})
        finally:
            server.stop()


def exhaustion(folder: Path, args: argparse.Namespace, texts: Prompts, done: Callable[[Record], None]) -> None:
    """24 clients of 500 and 100 tokens, a pool for eight and a queue of four: refused ones come back as told."""
    new = 100
    limits = ("--cache-memory", args.small_pool, "--max-waiting", "4", "--prefixes", "0", "--max-running", "16")
    server = start("smollm2", folder, *limits)
    try:
        api, prompts, refusals, held = connect(server), texts.take(24, 500), [], []
        alone = ask(api, prompts[0], new)
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.2):
                held.append([server.metric(f"forgeattention_{x}") for x in ("pages_in_use", "running", "waiting")])

        def insist(prompt: list[int]) -> Record:
            while True:
                try:
                    return ask(api, prompt, new)
                except openai.RateLimitError as error:
                    refusals.append(float(error.response.headers["retry-after"]))
                    time.sleep(refusals[-1])

        watcher, begun = threading.Thread(target=watch), time.perf_counter()
        watcher.start()
        with ThreadPoolExecutor(len(prompts)) as pool:
            out = list(pool.map(insist, prompts))
        seconds = time.perf_counter() - begun
        over.set()
        watcher.join()
        again = ask(api, prompts[0], new)
        time.sleep(0.5)
        done(
            {
                "op": "exhaustion",
                "clients": len(prompts),
                "pages": server.metric("forgeattention_pages"),
                "pages_of_a_request": (500 + new) // PAGE + 1,
                "most_pages_in_use": max(x[0] for x in held),
                "most_running": max(x[1] for x in held),
                "most_waiting": max(x[2] for x in held),
                "refused": len(refusals),
                "answered": sum(x["new"] > 0 for x in out),
                "seconds": round(seconds, 2),
                "pages_in_use_after": server.metric("forgeattention_pages_in_use"),
                "same_answer_after": again["text"] == alone["text"],
            }
        )
    finally:
        server.stop()


def sessions(_: Path, args: argparse.Namespace, texts: Prompts, done: Callable[[Record], None]) -> None:
    """Bytes of one sequence's pages and exact tokens, and those of transformers' own cache."""
    model, _tokenizer = models.load("smollm2", dtype=torch.float32, attn_implementation="forge")
    cache, tokens = ForgeCache(model), args.prompt + args.tokens
    ids = torch.tensor(texts.take(1, tokens))
    with torch.inference_mode():
        for at in range(0, tokens, 512):
            model(input_ids=ids[:, at : at + 512], past_key_values=cache, use_cache=True, logits_to_keep=1)
    text, gib = model.config.get_text_config(decoder=True), 1 << 30
    record = CodecSpec().page_format(text.head_dim).record_bytes * text.num_key_value_heads
    exact = sum(layer.cache.nbytes - layer.cache.pool.nbytes for layer in cache.layers)
    pages, layers = tokens // PAGE + 1, text.num_hidden_layers
    own = 2 * text.num_key_value_heads * text.head_dim * layers * tokens
    packed = pages * record * layers
    done(
        {
            "op": "sessions",
            "tokens": tokens,
            "pool_tokens": gib // (record * layers) * PAGE,
            "pages_of_a_session": pages,
            "page_bytes": packed,
            "exact_bytes": exact,
            "sessions_admitted": gib // (record * layers) // pages,
            "sessions_with_exact_tokens": gib // (packed + exact),
            "sessions_float16": gib // (2 * own),
            "sessions_float32": gib // (4 * own),
        }
    )


def memory(folder: Path, requests: int, done: Callable[[Record], None]) -> None:
    """Resident bytes of a server of a random one-layer model at ten moments of many short requests."""
    sizes = {"num_hidden_layers": 1, "head_dim": 64, "hidden_size": 128, "num_attention_heads": 2}
    model = folder / "smollm2"
    tiny.llama(**sizes, num_key_value_heads=1).float().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    server = start(str(model), folder, "--piece", "64", "--cache-memory", "64MiB")
    try:
        random, api, held = np.random.default_rng(0), connect(server), []
        process, begun = psutil.Process(server.process.pid), time.perf_counter()
        with ThreadPoolExecutor(8) as pool:
            for _ in range(10):
                prompts = [random.integers(3, 250, random.integers(100, 300)).tolist() for _ in range(requests // 10)]
                list(pool.map(lambda prompt: ask(api, prompt, 3), prompts))
                held.append(process.memory_info().rss)
                print(held[-1], round(time.perf_counter() - begun, 1), flush=True)
        done(
            {
                "op": "steady",
                "requests": requests,
                "resident_bytes": held,
                "bytes_per_request": round((held[-1] - held[4]) / (requests / 2)),
                "answered": server.metric("forgeattention_requests_total"),
                "pages_in_use": server.metric("forgeattention_pages_in_use"),
                "prefixes": server.metric("forgeattention_prefixes"),
            }
        )
    finally:
        server.stop()


PARTS = {"load": load, "prefix": prefix, "exhaustion": exhaustion, "sessions": sessions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 1, 1, 4, 16])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--shared", type=int, default=1500)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--small-pool", default="24MiB", help="pages' memory for `exhaustion`")
    parser.add_argument("--requests", type=int, help="measure only memory over so many short requests")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    env = {**environment(), "threads": torch.get_num_threads(), "load": os.getloadavg()}
    about = {"model": "smollm2", "dtype": "float32", "prompt": args.prompt, "tokens": args.tokens, "gib": 1}
    records: list[Record] = [{"op": "env", "env": env if args.requests else {**env, **about}}]

    def done(record: Record) -> None:
        records.append(record)
        print(record, flush=True)
        if args.output:
            write_json(args.output, records)

    with tempfile.TemporaryDirectory() as scratch:
        if args.requests:
            memory(Path(scratch), args.requests, done)
        else:
            prompts = Prompts()
            for part in args.parts:
                PARTS[part](Path(scratch), args, prompts, done)
    records[0]["env"]["load"] += os.getloadavg()
    if args.output:
        write_json(args.output, records)


if __name__ == "__main__":
    main()
