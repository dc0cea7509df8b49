"""mlx-lm with packed caches on MLX's GPU backends: attention, whole-model decode, and fidelity beside transformers.

    python benchmarks/bench_mlx.py attention decode fidelity --model smollm2 --json OUT

attention  one new token over packed pages, beside MLX's attention in FP16 and mlx-lm's 8- and 4-bit caches
decode     tokens/s of a model of random weights (8B) and of --model, in FP16, over a cache filled with random keys and
           values, exact and packed in turns
fidelity   KL on four texts and needles, of each preset, by mlx-lm and by transformers on the same tokens, in float32

Run `fidelity` alone with MLX_ENABLE_TF32=0: MLX multiplies float32 on tensor cores otherwise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock

from forgeattention import models
from forgeattention.codec import CodecSpec
from forgeattention.codec.presets import PRESETS
from forgeattention.integrations.mlx import make_prompt_cache, patched
from forgeattention.tools.bench import metal as bench_mlx
from forgeattention.util.environment import environment
from forgeattention.util.files import write_json

SHAPES = [(1, 32768), (1, 131072), (1, 524288), (8, 32768), (8, 131072)]
HEADS = (32, 8, 128)
BLOCK, STEPS = 128, 16
TEXTS = ("genesis", "licences", "code", "json")


def attention(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Records of `forgeattn bench decode`, for the default codec and for scalar codes."""
    copy = bench_mlx.copy_bandwidth()
    for name in ("balanced", "scalar"):
        spec = PRESETS["balanced"] if name == "balanced" else CodecSpec(k_code="scalar", v_code="scalar")
        for batch, context in SHAPES:
            r = bench_mlx.measure(spec, batch, *HEADS, context, copy)
            peers = ", ".join(f"{peer} {us:.0f}" for peer, us in r["peers_us"].items())
            print(
                f"{name} {batch} x {context}: {r['us']:.0f} us, {r['ratio']:.2f}x, {r['share_of_copy']:.0%} of copy,"
                f" error {r['rel_error']:.1e}; {peers}",
                flush=True,
            )
            yield {**r, "k_code": spec.k_code, "v_code": spec.v_code, "copy_gb_s": copy}


def random_llama() -> Any:
    """A model of Llama-3.1-8B's shape with random weights, in FP16."""
    from mlx.utils import tree_map
    from mlx_lm.models import llama

    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32}
    sizes |= {"num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 128, "rope_theta": 500000.0}
    args = llama.ModelArgs.from_dict({"model_type": "llama", "rms_norm_eps": 1e-5, **sizes})
    made = llama.Model(args)
    made.update(tree_map(lambda p: (mx.random.normal(p.shape) * 0.02).astype(mx.float16), made.parameters()))
    mx.eval(made.parameters())
    return made


def decode(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Whole-model decode over synthetic contexts. Tokens are sent off one after the other, as mlx-lm does."""
    models_by_name = {"random 8B": random_llama, args.model: lambda: models.load_mlx(args.model, dtype="float16")[0]}
    for name, make in models_by_name.items():
        yield from _decode(name, make(), args)


def _decode(name: str, model: Any, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    kv_heads, dim = model.args.num_key_value_heads, model.layers[0].self_attn.head_dim
    for context in args.contexts:
        caches = {"exact": stock.make_prompt_cache(model), "packed": make_prompt_cache(model)}
        for i in range(len(model.layers)):
            mx.random.seed(i)
            k, v = (mx.random.normal((1, kv_heads, context, dim)).astype(mx.float16) for _ in range(2))
            caches["exact"][i].update_and_fetch(k, v)
            with patched():
                states, _ = caches["packed"][i].update_and_fetch(k, v)
                states.append()
            mx.eval([x.state for x in (caches["exact"][i], caches["packed"][i])])
        held = {cache: sum(layer.nbytes for layer in layers) for cache, layers in caches.items()}
        seconds: dict[str, list[float]] = {cache: [] for cache in caches}
        with patched():
            for turn in range(args.rounds + 1):
                for cache, layers in caches.items():
                    token, start = mx.array([[1]]), time.perf_counter()
                    for _ in range(STEPS):
                        token = model(token, cache=layers)[:, -1].argmax(-1)[:, None]
                        mx.async_eval(token)
                    mx.eval(token)
                    if turn:
                        seconds[cache].append((time.perf_counter() - start) / STEPS)
        speed = {cache: 1 / statistics.median(s) for cache, s in seconds.items()}
        ratio = speed["packed"] / speed["exact"]
        print(f"{name} at {context}: {speed['packed']:.1f} / {speed['exact']:.1f} tokens/s, {ratio:.2f}x; {held}")
        record = {"op": "mlx_decode", "model": name, "context": context, "tokens_per_s": speed}
        yield {**record, "decode_ratio": ratio, "bytes": held}
        del caches


def log_probabilities(model: Any, ids: list[int], cache: list[Any]) -> mx.array:
    """Of the next token at the second half of a document that is read block by block, [positions, vocabulary]."""
    half, out = len(ids) // 2, []
    for start in range(0, len(ids), BLOCK):
        logits = model(mx.array([ids[start : start + BLOCK]]), cache=cache)[0].astype(mx.float32)
        mx.eval(logits)
        if start + BLOCK > half:
            logits = logits[max(0, half - start) :]
            out.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    return mx.concatenate(out)


def mlx_kl(model: Any, texts: list[list[int]], make: Callable[[], list[Any]]) -> dict[str, float]:
    """Mean KL to the exact cache and share of the same top token."""
    kl = same = positions = 0.0
    for ids in texts:
        p = log_probabilities(model, ids, stock.make_prompt_cache(model))
        q = log_probabilities(model, ids, make())
        kl += float((mx.exp(p) * (p - q)).sum(-1).sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        positions += len(p)
    return {"kl": kl / positions, "same_top": same / positions, "positions": positions}


def mlx_answer(model: Any, tokenizer: Any, ids: list[int], cache: list[Any], stop: int, most: int = 24) -> str:
    """What the model says to a prompt, greedily, up to the token `stop`."""
    for start in range(0, len(ids), 2 * BLOCK):
        logits = model(mx.array([ids[start : start + 2 * BLOCK]]), cache=cache)
    new = [int(logits[0, -1].argmax())]
    while len(new) < most and new[-1] != stop:
        new.append(int(model(mx.array([new[-1:]]), cache=cache)[0, -1].argmax()))
    return tokenizer.decode(new, skip_special_tokens=True)


def fidelity(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """KL and needles of every preset by both frameworks."""
    import torch
    from transformers import DynamicCache

    from forgeattention.integrations.hf.cache import ForgeCache
    from forgeattention.tools.evaluation import kl, niah, texts

    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs, tokenizer = models.load(args.model, device=device)
    ours, _ = models.load_mlx(args.model)
    pieces = []
    for name in TEXTS:
        ids = tokenizer(texts.enough(name, 40_000), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        first = (len(ids) - args.length) // 2
        pieces.append(ids[first : first + args.length])
    read = torch.stack(pieces)
    documents = [
        document
        for needle in (niah.Needle(), niah.Needle("SILVER COMPASS", "3159"))
        for document in niah.documents("single", tokenizer, [args.haystack], needle=needle)
    ]
    for name, spec in {"exact": None, **PRESETS}.items():
        make_theirs = (
            (lambda spec=spec: ForgeCache(theirs, spec)) if spec else lambda: DynamicCache(config=theirs.config)
        )
        make_ours = (lambda spec=spec: make_prompt_cache(ours, spec)) if spec else lambda: stock.make_prompt_cache(ours)
        found: dict[str, Any] = {"op": "mlx_fidelity", "cache": name}
        forge = "forge" if spec else None
        with patched():
            if spec:
                hf = kl.compare(theirs, read, make_theirs, block=BLOCK, implementation=forge)
                found["transformers"] = {"kl": hf.kl, "same_top": hf.same_top, "positions": hf.positions}
                found["mlx_lm"] = mlx_kl(ours, read.tolist(), make_ours)
                found["effective_bits"] = spec.page_format(ours.layers[0].self_attn.head_dim).effective_bits
            replies: dict[str, list[str]] = {"transformers": [], "mlx_lm": []}
            passed = dict.fromkeys(replies, 0)
            for document in documents:
                ((_, needle),) = document.asked
                ids = niah.prompt(tokenizer, document.text, needle.question)[0].tolist()
                cells = niah.ask(theirs, tokenizer, document, make_theirs, implementation=forge)
                replies["transformers"].append(cells[0].reply.text)
                replies["mlx_lm"].append(
                    mlx_answer(ours, tokenizer, ids, make_ours(), theirs.generation_config.eos_token_id)
                )
                for side, texts_said in replies.items():
                    passed[side] += niah.judge(texts_said[-1], needle, hay=document.hay) == niah.Outcome.PASS
        found["needles"] = {**passed, "of": len(documents)}
        found["same_replies"] = sum(a == b for a, b in zip(*replies.values()))
        print({key: value for key, value in found.items() if key != "op"}, flush=True)
        yield found


PARTS = {"attention": attention, "decode": decode, "fidelity": fidelity}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 131072], help="of decode")
    parser.add_argument("--rounds", type=int, default=5, help="of decode (default %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="of texts (default %(default)s)")
    parser.add_argument("--haystack", type=int, default=1500, help="tokens (default %(default)s)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    info = mx.device_info()
    env = {**environment(), "device": info["device_name"], "mlx_device": str(mx.default_device())}
    env |= {"model": args.model, "tf32": os.environ.get("MLX_ENABLE_TF32", "1")}
    env["commit"] = env["commit"] or os.environ.get("FORGEATTENTION_COMMIT")
    records: list[dict[str, Any]] = [{"op": "env", "env": env}]
    for part in args.parts:
        for record in PARTS[part](args):
            records.append(record)
            if args.json:
                write_json(args.json, records)


if __name__ == "__main__":
    main()
