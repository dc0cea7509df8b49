"""What a vLLM engine with packed caches must get right, on a GPU or, as a trial, on a CPU. Each check is one process:

    vllm_checks.py texts --model FOLDER --engine packed-balanced --graphs decode --json a.json    32 greedy answers
    vllm_checks.py transformers --model FOLDER --json b.json           the same by transformers with a packed cache
    vllm_checks.py compare a.json b.json --json c.json                 where answers part, and whether at a tie
    vllm_checks.py logprobs --model FOLDER --window 128 --json d.json  likeliest tokens of a text read in small chunks
    vllm_checks.py kl e.json d.json --json f.json                      how far two of these are apart
    vllm_checks.py alone | load | pool | prefix | sleep | counts       named by what they check

A record says `passed`; where one is false, the exit status is 1. Two answers part at a tie where the engine's own
log-probabilities of the two tokens differ by at most TIE: logits of 16 to 32 have steps of 0.125 in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_engines import add_arguments, environment_record, make, named, prompts_of, text_ids

TIE = 0.25
Record = dict[str, Any]


def lengths(a: argparse.Namespace, count: int = 32) -> list[int]:
    """Lengths of `count` prompts, from 1 token to half of the longest sequence, evenly by their logarithm."""
    most = math.log(a.length // 2)
    return [max(1, round(math.exp(most * i / (count - 1)))) for i in range(count)]


def mixed(a: argparse.Namespace, llm: Any, count: int = 32) -> list[list[int]]:
    """Prompts of these lengths, of other text each."""
    ids = text_ids(a, llm)
    return [(ids * 2)[61 * i : 61 * i + n] for i, n in enumerate(lengths(a, count))]


def answers(llm: Any, prompts: list[list[int]], new: int, logprobs: int | None = 5) -> list[Record]:
    """Greedy tokens of every prompt, and the likeliest ones of every step."""
    from vllm import SamplingParams

    ask = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, logprobs=logprobs)
    outs = llm.generate([{"prompt_token_ids": x} for x in prompts], ask, use_tqdm=False)
    said = []
    for out in outs:
        first = out.outputs[0]
        likely = [{k: v.logprob for k, v in step.items()} for step in first.logprobs or ()]
        said.append({"tokens": list(first.token_ids), "likely": likely})
    return said


def parted(one: list[Record], other: list[Record]) -> Record:
    """How many answers are the same, and at which gaps the others part, by `one`'s log-probabilities."""
    gaps = []
    for a, b in zip(one, other, strict=True):
        at = next((i for i, (x, y) in enumerate(zip(a["tokens"], b["tokens"])) if x != y), None)
        if at is None:
            continue
        likely = {int(k): v for k, v in a["likely"][at].items()}
        gaps.append(likely[a["tokens"][at]] - likely.get(b["tokens"][at], -math.inf))
    same = len(one) - len(gaps)
    gaps = [gap if math.isfinite(gap) else 99.0 for gap in gaps]
    return {"answers": len(one), "same": same, "gaps": gaps, "passed": all(gap <= TIE for gap in gaps)}


def texts(a: argparse.Namespace) -> list[Record]:
    llm = make(a)
    said = answers(llm, mixed(a, llm), a.new)
    return [{"case": "texts", "lengths": lengths(a), "said": said, "passed": all(x["tokens"] for x in said)}]


def transformers(a: argparse.Namespace) -> list[Record]:
    """The same prompts, one by one, with the same codecs in a cache of our own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from forgeattention import PRESETS, ForgeCache

    # The plugin rounds 4 sinks up to an exact block: 8 tokens with 16-bit weights and head_dim 128.
    spec = replace(PRESETS[a.engine.removeprefix("packed-")], sinks=8, window=64)
    kind = torch.float32 if a.device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=kind, attn_implementation="forge").to(a.device)

    class Named:
        def get_tokenizer(self) -> Any:
            return AutoTokenizer.from_pretrained(a.model)

    said = []
    for prompt in mixed(a, Named()):
        cache = ForgeCache(model, spec)
        ids = torch.tensor([prompt], device=a.device)
        options = {"max_new_tokens": a.new, "min_new_tokens": a.new, "do_sample": False}
        out = model.generate(ids, past_key_values=cache, output_logits=True, return_dict_in_generate=True, **options)
        likely = []
        for logits in out.logits:
            value, token = torch.log_softmax(logits[0].float(), -1).topk(5)
            likely.append(dict(zip(token.tolist(), value.tolist())))
        said.append({"tokens": out.sequences[0, len(prompt) :].tolist(), "likely": likely})
    return [{"case": "texts", "by": "transformers", "lengths": lengths(a), "said": said, "passed": True}]


def compare(a: argparse.Namespace) -> list[Record]:
    one, other = (_record(file, "texts") for file in a.files)
    return [{"case": "compare", "what": [file.stem for file in a.files], **parted(one["said"], other["said"])}]


def logprobs(a: argparse.Namespace) -> list[Record]:
    from vllm import SamplingParams

    # Small chunks, as decoding is: within a chunk all tokens are exact.
    llm = make(a, settings={"window": a.window}, max_num_batched_tokens=128, max_num_seqs=8)
    ask = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=20, detokenize=False)
    prompts = prompts_of(text_ids(a, llm), 4, min(4096, a.length - 8))
    outs = llm.generate([{"prompt_token_ids": x} for x in prompts], ask, use_tqdm=False)
    half = len(prompts[0]) // 2
    likely = [{k: v.logprob for k, v in d.items()} for out in outs for d in out.prompt_logprobs[half:]]
    return [
        {
            "case": "logprobs",
            "window": a.window,
            "likely": likely,
            "passed": len(likely) == 4 * (len(prompts[0]) - half),
        }
    ]


def kl(a: argparse.Namespace) -> list[Record]:
    """KL over the tokens that both name, and the rest as one."""
    one, other = (_record(file, "logprobs") for file in a.files)
    total = same = 0.0
    for p, q in zip(one["likely"], other["likely"], strict=True):
        both = p.keys() & q.keys()
        rest = [max(1 - sum(math.exp(x[k]) for k in both), 1e-9) for x in (p, q)]
        total += sum(math.exp(p[k]) * (p[k] - q[k]) for k in both) + rest[0] * math.log(rest[0] / rest[1])
        same += max(p, key=p.__getitem__) == max(q, key=q.__getitem__)
    count = len(one["likely"])
    found = {"kl": total / count, "same_top": same / count, "positions": count}
    return [{"case": "kl", "what": [file.stem for file in a.files], "window": other["window"], **found, "passed": True}]


def alone(a: argparse.Namespace) -> list[Record]:
    """Three requests alone, and among 61 others."""
    llm = make(a)
    prompts = mixed(a, llm, a.requests)
    asked = [0, a.requests // 3, a.requests - 1]
    among = answers(llm, prompts, a.new)
    single = [answers(llm, [prompts[i]], a.new)[0] for i in asked]
    return [{"case": "alone", "requests": a.requests, **parted(single, [among[i] for i in asked])}]


def load(a: argparse.Namespace) -> list[Record]:
    """Many requests of mixed lengths at once, every eighth of which is cancelled; no block may be held at the end."""
    from vllm import SamplingParams

    llm = make(a, max_num_seqs=a.requests, enable_prefix_caching=True)
    engine, ended, begun = llm.llm_engine, {}, time.perf_counter()
    ask = SamplingParams(temperature=0, max_tokens=a.new, ignore_eos=True, detokenize=False)
    prompts = mixed(a, llm, a.requests)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, ask)
    cancelled = [str(i) for i in range(5, a.requests, 8)]
    steps = 0
    while engine.has_unfinished_requests():
        for out in engine.step():
            if out.finished:
                ended[out.request_id] = len(out.outputs[0].token_ids)
        steps += 1
        if steps == 8:
            engine.abort_request(cancelled)
    wanted = {str(i): a.new for i in range(a.requests)}
    whole = all(ended.get(name) == wanted[name] for name in wanted if name not in cancelled)
    free, total = _blocks(llm)
    found = {
        "requests": a.requests,
        "cancelled": len(cancelled),
        "steps": steps,
        "whole_s": time.perf_counter() - begun,
    }
    return [{"case": "load", **found, "free": free, "blocks": total, "passed": whole and free == total - 1}]


def pool(a: argparse.Namespace) -> list[Record]:
    """A pool that is too small for the requests: they are preempted and resumed, and say what one alone says."""
    prompt, requests = min(200, a.length // 4), min(16, a.requests)
    new = max(a.new, 100)
    llm = make(
        a, num_gpu_blocks_override=a.pool, max_num_seqs=requests, disable_log_stats=False, max_num_batched_tokens=256
    )
    prompts = prompts_of(text_ids(a, llm), requests, prompt)
    together = answers(llm, prompts, new)
    metrics = {m.name: m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"}
    single = answers(llm, prompts[:1], new)
    found = {"preemptions": metrics["vllm:num_preemptions"], "requests": requests, "blocks": a.pool}
    same = parted(single, together[:1])
    return [{"case": "pool", **found, **same, "passed": same["passed"] and found["preemptions"] > 0}]


def prefix(a: argparse.Namespace) -> list[Record]:
    """A second request with the same long start takes it from the prefix cache, and says the same."""
    llm = make(a, enable_prefix_caching=True)
    (start,) = prompts_of(text_ids(a, llm), 1, a.length // 2)
    cold = answers(llm, [[*start, 200 + i] for i in range(4)], a.new)
    warm = answers(llm, [[*start, 200 + i] for i in range(4)], a.new)
    from vllm import SamplingParams

    ask = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    (out,) = llm.generate([{"prompt_token_ids": [*start, 300]}], ask, use_tqdm=False)
    same = parted(cold, warm)
    wanted = len(start) // 64 * 64
    return [
        {
            "case": "prefix",
            "hit": out.num_cached_tokens,
            **same,
            "passed": same["passed"] and out.num_cached_tokens == wanted,
        }
    ]


def sleep(a: argparse.Namespace) -> list[Record]:
    """vLLM's sleep mode gives memory back and takes it again."""
    llm = make(a, enable_sleep_mode=True)
    prompts = mixed(a, llm, 4)
    before = answers(llm, prompts, a.new)
    llm.sleep(level=1)
    llm.wake_up()
    return [{"case": "sleep", **parted(before, answers(llm, prompts, a.new))}]


def counts(a: argparse.Namespace) -> list[Record]:
    """Launches, allocations and waits of steps in which all rows decode, by the profiler."""
    import torch
    from vllm import SamplingParams

    llm = make(a)
    engine, rows, steps = llm.llm_engine, min(32, a.requests), 16
    ask = SamplingParams(temperature=0, max_tokens=steps + 48, ignore_eos=True, detokenize=False)
    for i, prompt in enumerate(prompts_of(text_ids(a, llm), rows, min(2048, a.length // 2))):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, ask)
    made: Counter[str] = Counter()
    while engine.has_unfinished_requests() and (len(made) < rows or min(made.values()) < 8):
        for out in engine.step():
            made[out.request_id] = len(out.outputs[0].token_ids)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if a.device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if a.device == "cuda" else 0
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(steps):
            engine.step()
    calls: Counter[str] = Counter()
    kernels: dict[str, list[float]] = {}
    for event in profile.events():
        if event.name.startswith(("cuda", "cu")) or event.name == "aten::empty":
            calls[event.name] += 1
        if "DeviceType.CUDA" in str(event.device_type):
            kernels.setdefault(event.name[:80], []).append(event.device_time)
    while engine.has_unfinished_requests():
        engine.step()
    per_step = {name: count / steps for name, count in sorted(calls.items())}
    slowest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:20]
    table = [{"kernel": name, "per_step": len(us) / steps, "us_per_step": sum(us) / steps} for name, us in slowest]
    grown = torch.cuda.max_memory_allocated() - held if a.device == "cuda" else 0
    # Of the cuda-runtime calls that a step must not make. vLLM's own wait for the sampled tokens is an event's.
    bad = {name: per_step.get(name, 0) for name in ("cudaMalloc", "cudaFree", "cudaDeviceSynchronize", "cuMemAlloc")}
    found = {"rows": rows, "steps": steps, "calls_per_step": per_step, "kernels": table, "grown_bytes": grown}
    return [{"case": "counts", **found, "passed": not any(bad.values())}]


CHECKS = (texts, transformers, compare, logprobs, kl, alone, load, pool, prefix, sleep, counts)


def _blocks(llm: Any) -> tuple[int, int]:
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return pool.get_num_free_blocks(), pool.num_gpu_blocks


def _record(file: Path, case: str) -> Record:
    return next(record for record in json.loads(file.read_text()) if record.get("case") == case)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=[check.__name__ for check in CHECKS])
    parser.add_argument("files", nargs="*", type=Path, help="two, for compare and kl")
    add_arguments(parser)
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--pool", type=int, default=300, help="blocks, for pool")
    parser.add_argument("--window", type=int, default=64, help="tokens kept exact, a multiple of 64, for logprobs")
    parser.add_argument("--json", type=Path, required=True)
    return parser


def main() -> None:
    a = parser().parse_args()
    from forgeattention.util.files import write_json

    check = next(check for check in CHECKS if check.__name__ == a.check)
    about = {"op": "vllm"} if a.files else named(a)
    records = [about | record for record in check(a)]
    write_json(a.json, [environment_record(), *records])
    for record in records:
        print(json.dumps({k: v for k, v in record.items() if k not in ("said", "likely")}), flush=True)
    sys.exit(not all(record["passed"] for record in records))


if __name__ == "__main__":
    main()
