"""Our transformers server on this machine: time to first token and tokens/s by clients, shared prefixes, room, memory.

    python benchmarks/serving_hf.py --json benchmarks/results/serving-hf-cpu-DATE.json
    python benchmarks/serving_hf.py --requests 4000 --json FILE        memory over many short requests

Each client sends a prompt of other text and reads a stream. Beside it, one client after the other, transformers'
`generate` with its own cache.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import openai
import psutil
import torch

from forgeattention import models
from forgeattention.codec import PAGE, CodecSpec
from forgeattention.evaluation import report, texts

CODE = "import sys; from forgeattention.cli import main; sys.exit(main())"


class Server:
    """`forgeattn serve --engine hf` in a process of its own."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-c", CODE, "serve", "--engine", "hf", "--model", "smollm2", "--port", "0", "--"]
        self.process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.url = line.split(" at ")[1].split("/v1")[0]
        self.room = int(line.split("room for ")[1].split()[0])
        self.api = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=3600, max_retries=0)

    def ask(self, text: str, tokens: int) -> dict[str, float]:
        """Seconds to the first and to the last piece of an answer, and its pieces."""
        start, times = time.perf_counter(), []
        options: Any = {"temperature": 0, "stream": True}
        for chunk in self.api.completions.create(model="smollm2", prompt=text, max_tokens=tokens, **options):
            times.append(time.perf_counter())
            last = chunk.choices[0].finish_reason
        if last not in ("length", "stop"):
            raise RuntimeError(f"an answer ended with {last!r}")
        return {"first": times[0] - start, "last": times[-1] - start}

    def metric(self, name: str) -> float:
        text = urllib.request.urlopen(f"{self.url}/metrics").read().decode()
        return float(re.search(rf"^forgeattention_{name} (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]

    def seconds(self) -> float:
        """Processor time so far."""
        used = psutil.Process(self.process.pid).cpu_times()
        return used.user + used.system

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def load(server: Server, prompts: list[str], tokens: int, count: int) -> dict[str, Any]:
    """All prompts at once, one client each; `count` tokens of a prompt."""
    out: queue.Queue[dict[str, float]] = queue.Queue()
    threads = [threading.Thread(target=lambda p=p: out.put(server.ask(p, tokens))) for p in prompts]
    hits, used, start = server.metric("prefix_hit_tokens_total"), server.seconds(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    answers = [out.get_nowait() for _ in prompts]
    return {
        "op": "serve",
        "clients": len(prompts),
        "seconds": seconds,
        "all_tokens_per_second": len(prompts) * (count + tokens) / seconds,
        "seconds_to_first_token": statistics.median(x["first"] for x in answers),
        "seconds_per_later_token": statistics.median((x["last"] - x["first"]) / max(tokens - 1, 1) for x in answers),
        "processor_seconds": server.seconds() - used,
        "prefix_hit_tokens": server.metric("prefix_hit_tokens_total") - hits,
    }


def exhausted(options: list[str], prompts: list[str], tokens: int) -> dict[str, Any]:
    """A pool with room for two of the prompts: every client is answered in the end, or told at once to come later."""
    server = Server("--max-waiting", "4", *options)
    out: list[str] = []

    def ask(text: str) -> None:
        try:
            server.ask(text, tokens)
            out.append("answered")
        except openai.RateLimitError as error:
            out.append(f"429, Retry-After {error.response.headers['retry-after']}")

    try:
        threads = [threading.Thread(target=ask, args=(p,)) for p in prompts]
        for thread in threads:
            thread.start()
            time.sleep(0.2)
        for thread in threads:
            thread.join()
        again = server.ask(prompts[-1], tokens)
        return {"op": "exhausted", "room": server.room, "outcomes": sorted(out), "afterwards": again["last"] > 0}
    finally:
        server.stop()


def generate(ids: list[list[int]], tokens: int) -> dict[str, Any]:
    """transformers' own `generate`, one prompt after the other."""
    model, _ = models.load("smollm2")
    first, seconds, used = [], [], time.process_time()
    for prompt in ids:
        row = torch.tensor([prompt])
        for count, into in ((1, first), (tokens, seconds)):
            start = time.perf_counter()
            model.generate(row, max_new_tokens=count, min_new_tokens=count, do_sample=False)
            into.append(time.perf_counter() - start)
    return {
        "op": "generate",
        "seconds_to_first_token": statistics.median(first),
        "all_tokens_per_second": (len(ids[0]) + tokens) / statistics.median(seconds),
        "processor_seconds": (time.process_time() - used) / len(ids),
    }


def steady(requests: int) -> dict[str, Any]:
    """An engine of a random model of one layer over many short requests: resident bytes at ten moments."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from serving_engine import Asked, engine
    from tiny import llama

    made = llama(
        head_dim=64, hidden_size=64, num_hidden_layers=1, attn_implementation="forge", max_position_embeddings=4096
    ).float()
    made.generation_config.eos_token_id = None
    served = engine(made, max_pages=400, max_waiting=64)
    random, held = torch.Generator().manual_seed(0), []
    for _ in range(10):
        for _ in range(requests // 160):
            sizes = torch.randint(60, 200, (16,), generator=random).tolist()
            asked = [Asked(served, torch.randint(0, 256, (n,), generator=random).tolist(), max_tokens=3) for n in sizes]
            for one in asked:
                one.wait()
        held.append(psutil.Process().memory_info().rss)
    served.prefixes._kept.clear()
    used = served.pages_in_use
    served.drain(5)
    return {"op": "steady", "requests": requests // 160 * 160, "resident_bytes": held, "pages_in_use": used}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--requests", type=int, help="measure only memory, over so many short requests")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    env = {**report.environment(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    setting = {"model": "smollm2", "dtype": "float32", "prompt": args.prompt, "tokens": args.tokens}
    records: list[dict[str, Any]] = [{"op": "env", "env": env, **setting, "spec": CodecSpec().to_json()}]

    def add(record: dict[str, Any]) -> None:
        records.append(record)
        print(record, flush=True)
        if args.json:
            report.write_json(args.json, records)

    if args.requests:
        add(steady(args.requests))
        return
    tokenizer = models.load("smollm2")[1]
    ids = [i for name in ("genesis", "licences") for i in tokenizer(texts.read(name)).input_ids]

    def pieces(count: int, seed: int, length: int = args.prompt) -> list[list[int]]:
        starts = [1000 * (seed * 17 + j) % (len(ids) - length) for j in range(count)]
        return [ids[start : start + length] for start in starts]

    server = Server()
    try:
        server.ask("Warm up.", 4)
        for i, count in enumerate(args.clients):
            prompts = [tokenizer.decode(piece) for piece in pieces(count, i)]
            add(load(server, prompts, args.tokens, args.prompt))
        common = tokenizer.decode(ids[-1500:])
        prompts = [f"{common} Question {n}: what is meant?" for n in range(5)]
        server.ask(prompts[0], args.tokens)
        add({**load(server, prompts[1:], args.tokens, 1508), "op": "shared"})
    finally:
        server.stop()
    add(generate(pieces(3, 7), args.tokens))
    packed = (args.prompt + args.tokens) // PAGE + 1
    add({"op": "room", "tokens_per_gib": server.room, "sequences_per_gib": server.room // PAGE // packed})
    small = ["--cache-memory", "8MB", "--piece", "128"]
    add(exhausted(small, [tokenizer.decode(piece) for piece in pieces(10, 9, 256)], 8))


if __name__ == "__main__":
    main()
