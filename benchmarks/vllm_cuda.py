"""vLLM on an NVIDIA GPU, with its own caches and with packed ones: tokens that fit, steps, prompts, throughput.

    python benchmarks/vllm_cuda.py --model FOLDER --json benchmarks/results/vllm-cuda-h200-DATE.json

Every engine is a process of its own with the same flags, one after the other on an idle GPU. A case COUNTxPROMPT+NEW is
COUNT requests of PROMPT tokens of other text each, with NEW greedy tokens: `prefill_s` is the time of the same requests
with one new token, `step_ms` the rest over NEW - 1 steps. "equal" gives each engine the memory in which vLLM's own
16-bit cache holds a quarter of the requests. --shape llama-8b has random weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from vllm_engines import ENGINES, add_arguments, environment_record, make, named, prompts_of, text_ids

CASES = "1x2048+64 32x2048+128 64x8192+128 16x32000+128"
EQUAL = "160x4096+1024"
QUESTIONS = ["The capital of France is", "def quicksort(a):", "Once upon a time", "The three primary colours are"]


def numbers(case: str) -> tuple[int, int, int]:
    count, rest = case.split("x")
    prompt, new = rest.split("+")
    return int(count), int(prompt), int(new)


def say(**record: Any) -> None:
    print("RECORD " + json.dumps(record), flush=True)


def child(a: argparse.Namespace) -> None:
    """Runs one engine and prints its records."""
    from vllm import SamplingParams

    about, options = named(a), {}
    if a.bytes:
        options["kv_cache_memory_bytes"] = a.bytes
        about["memory"] = f"{a.bytes} bytes"
    say(**environment_record())
    begun = time.perf_counter()
    llm = make(a, disable_log_stats=True, **options)
    cache = llm.llm_engine.vllm_config.cache_config
    say(
        **about,
        case="start",
        whole_s=time.perf_counter() - begun,
        kv_tokens=cache.kv_cache_size_tokens,
        kv_requests=cache.kv_cache_max_concurrency,
        length=a.length,
    )
    if not a.shape:
        greedy = SamplingParams(temperature=0, max_tokens=48)
        for question, out in zip(QUESTIONS, llm.generate(QUESTIONS, greedy, use_tqdm=False)):
            say(**about, case="text", prompt=question, text=out.outputs[0].text)
    ids = text_ids(a, llm)

    def seconds(prompts: list[list[int]], new: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        begun = time.perf_counter()
        llm.generate([{"prompt_token_ids": x} for x in prompts], sampling, use_tqdm=False)
        return time.perf_counter() - begun

    for case in a.cases.split():
        count, prompt, new = numbers(case)
        prompts = prompts_of(ids, count, prompt)
        seconds(prompts[: min(count, 4)], 8)
        record: dict[str, Any] = {"case": case}
        if not a.bytes:
            record["prefill_s"] = seconds(prompts, 1)
        record["whole_s"] = seconds(prompts, new)
        if not a.bytes:
            record["step_ms"] = 1e3 * (record["whole_s"] - record["prefill_s"]) / (new - 1)
        record["new_tokens_per_s"] = count * new / record["whole_s"]
        say(**about, **record)
    if a.profile:
        import torch

        count, prompt, _ = numbers(a.profile)
        prompts = prompts_of(ids, count, prompt)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            seconds(prompts, 64)
        print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=24, max_name_column_width=70))


def run(a: argparse.Namespace, engine: str, graphs: str, extra: list[str], log: Path) -> list[dict[str, Any]]:
    """The records of one engine in a process of its own; its failure is a record too."""
    own = [str(Path(__file__).resolve()), "--child", "--engine", engine, "--graphs", graphs, "--model", str(a.model)]
    own += ["--memory", str(a.memory), "--length", str(a.length), "--device", a.device, *extra]
    with log.open("a") as out:
        print("#", engine, graphs, *extra, file=out, flush=True)
        process = subprocess.Popen([a.python, *own], stdout=subprocess.PIPE, stderr=out, text=True)
        records, begun = [], time.monotonic()
        assert process.stdout is not None
        killer = threading.Timer(a.timeout, process.kill)
        killer.start()
        for line in process.stdout:
            out.write(line)
            if line.startswith("RECORD "):
                records.append(json.loads(line[7:]))
                print(line[7:].rstrip(), flush=True)
        killer.cancel()
        if process.wait():
            why = f"exit status {process.returncode} after {time.monotonic() - begun:.0f} s"
            records.append({"op": "vllm", "engine": engine, "graphs": graphs, "case": "failed", "why": why})
            print(records[-1], flush=True)
    return records


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--equal", default=EQUAL, help="case for equal memory; empty for none")
    parser.add_argument("--token-bytes", type=int, default=28672, help="of a token in the own 16-bit cache")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has vLLM")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for an engine")
    parser.add_argument("--profile", default="", help="case whose kernels' times go to the log; 64 new tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    a = parser().parse_args()
    if a.child:
        child(a)
        return
    from forgeattention.util.files import write_json

    log = Path(f"{a.json}.log" if a.json else "vllm_cuda.log")
    records: list[dict[str, Any]] = []
    shape = ["--shape", a.shape] if a.shape else []
    for engine in a.engines:
        profile = ["--profile", a.profile] if a.profile else []
        if a.cases:
            records += run(a, engine, a.graphs, ["--cases", a.cases, *shape, *profile], log)
        if a.equal:
            count, prompt, new = numbers(a.equal)
            memory = count // 4 * (prompt + new) * a.token_bytes
            records += run(a, engine, a.graphs, ["--cases", a.equal, "--bytes", str(memory), *shape], log)
        if a.json:
            # Every process says the same of versions and machine: once is enough.
            first = [record for record in records if record["op"] == "env"][:1]
            write_json(a.json, first + [record for record in records if record["op"] != "env"])
    if any(record.get("case") == "failed" for record in records):
        sys.exit(1)


if __name__ == "__main__":
    main()
