"""Tables of speed and memory for docs/results.md, from the JSON files of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from result_format import best_peer, count, shape, sparse_rule, table


def decode(records: list[dict[str, Any]]) -> str:
    """`decode_attention`: one row a shape, our codecs beside the fastest peer of the same run."""
    measured = [record for record in records if record.get("op") == "decode_attention"]

    def codec(record: dict[str, Any]) -> str:
        k, v = record.get("k_code"), record.get("v_code")
        if record.get("k_bits", 3) != 3:
            return "small" if record["k_bits"] == 2 else "fidelity"
        return "default" if k is None else k if k == v == "scalar" else "trellis keys" if v == "scalar" else "trellis"

    codecs = list(dict.fromkeys(codec(record) for record in measured))
    head = ["batch x context, heads, head_dim", "fastest peer", "peer us"]
    head += [f"{name}: us, ratio, share of copy" for name in codecs]
    rows = []
    for name in dict.fromkeys(shape(record) for record in measured):
        own = [record for record in measured if shape(record) == name]
        peer, us = min((best_peer(record) for record in own), key=lambda item: item[1])
        cells = []
        for wanted in codecs:
            record = next((record for record in own if codec(record) == wanted), None)
            if record is None:
                cells.append("")
                continue
            cells.append(f"{record['us']:.1f}, {us / record['us']:.2f}x, {record['share_of_copy']:.0%}")
        rows.append([name, peer, f"{us:.1f}", *cells])
    return table(head, rows)


def prefill(records: list[dict[str, Any]]) -> str:
    """`prefill_attention` and `encode` records of one run."""
    rows = []
    for record in records:
        if "us" not in record:
            continue
        peer, us = best_peer(record) if record.get("peers_us") else ("", None)
        ratio = None if us is None else f"{us / record['us']:.2f}x"
        rows.append(
            [record["op"], record.get("spec"), shape(record), f"{record['us']:.0f}", peer, us and f"{us:.0f}", ratio]
        )
    return table(["op", "codec", "batch x context, heads, head_dim", "us", "fastest peer", "peer us", "ratio"], rows)


def model(records: list[dict[str, Any]]) -> str:
    """`model`: a whole model with both caches by context."""
    rows = []
    for record in records:
        if record.get("op") != "model":
            continue
        speed, seconds = record["tokens_per_s"], record["prefill_s"]
        held, peak = record["bytes"], record["peak_rss_bytes"]
        rows.append(
            [
                record["context"],
                f"{speed['packed']:.1f} / {speed['exact']:.1f} ({record['decode_ratio']:.2f}x)",
                f"{seconds['packed']:.1f} / {seconds['exact']:.1f} ({record['prefill_ratio']:.2f}x)",
                f"{held['packed'] / 1e6:.1f} / {held['exact'] / 1e6:.1f}",
                f"{peak['packed'] / 1e6:.0f} / {peak['exact'] / 1e6:.0f}",
            ]
        )
    return table(["context", "decode tokens/s", "prefill s", "cache MB", "peak MB"], rows)


def mlx(records: list[dict[str, Any]]) -> str:
    """`bench_mlx.py`: attention, the model's decode, and fidelity, as three tables."""
    peers = ("mlx float16", "mlx-lm 8 bit", "mlx-lm 4 bit")
    attention, decoding, lost = [], [], []
    for r in records:
        if r["op"] == "decode_attention":
            codec = "scalar" if r["k_code"] == "scalar" else "balanced"
            us = [f"{r['us']:.0f}", *(f"{r['peers_us'][name]:.0f}" for name in peers)]
            ratio = f"{r['peers_us']['mlx float16'] / r['us']:.2f}x"
            attention.append([shape(r), codec, *us, ratio, f"{r['share_of_copy']:.0%}", f"{r['rel_error']:.1e}"])
        elif r["op"] == "mlx_decode":
            speed, held = r["tokens_per_s"], r["bytes"]
            ratio = f"{speed['packed']:.0f} / {speed['exact']:.0f} ({r['decode_ratio']:.2f}x)"
            decoding.append(
                [
                    Path(r["model"]).stem,
                    count(r["context"]),
                    ratio,
                    f"{held['packed'] / 1e6:.0f} / {held['exact'] / 1e6:.0f}",
                ]
            )
        elif r["op"] == "mlx_fidelity":
            row = [r["cache"]]
            for side in ("mlx_lm", "transformers"):
                row += [f"{r[side]['kl']:.4f}, {r[side]['same_top']:.1%}"] if side in r else [None]
                row.append(f"{r['needles'][side]} of {r['needles']['of']}")
            lost.append([*row, f"{r['same_replies']} of {r['needles']['of']}"])
    head = ["batch x context, heads, head_dim", "codec", "us", "FP16 us", "8 bit us", "4 bit us"]
    parts = [table([*head, "ratio to FP16", "share of copy", "error"], attention)] if attention else []
    if decoding:
        parts.append(table(["model", "context", "decode tokens/s, packed / FP16", "cache MB"], decoding))
    if lost:
        names = ["KL, same top token", "needles"]
        sides = [f"{side}: {name}" for side in ("mlx-lm", "transformers") for name in names]
        parts.append(table(["cache", *sides, "same replies"], lost))
    return "\n\n".join(parts)


def encode(records: list[dict[str, Any]]) -> str:
    """`encode` records: by codec and encoder, for a whole context and per 2048 tokens."""
    rows = []
    for record in records:
        if record.get("op") == "encode":
            encoder = "refined" if record["refine"] else "plain"
            us, context = record["us"], record["shape"]["context"]
            rows.append([record["spec"], encoder, count(context), f"{us:.0f}", f"{us * 2048 / context:.0f}"])
    return table(["codec", "encoder", "tokens", "us", "us per 2K tokens"], rows)


def cuda_prefill(records: list[dict[str, Any]]) -> str:
    """`prefill_attention` and `decode_pages` on CUDA beside both peers."""
    rows = []
    for record in records:
        if record.get("op") not in ("prefill_attention", "decode_pages"):
            continue
        peers = record.get("peers_us", {})
        cells = [f"{peers[p]:.0f} ({record[f'ratio_{p}']:.2f}x)" if p in peers else None for p in ("flash", "cudnn")]
        scratch = f"{record['scratch_bytes'] / 1e6:.0f}" if "scratch_bytes" in record else None
        share = f"{record['share_of_copy']:.0%}" if "share_of_copy" in record else None
        context = count(record["shape"]["context"])
        rows.append([record["op"], record["spec"], context, f"{record['us']:.0f}", *cells, share, scratch])
    head = ["op", "codec", "past", "us", "FP16 flash us", "FP16 cuDNN us", "share of copy", "memory taken, MB"]
    return table(head, rows)


def cuda_model(records: list[dict[str, Any]]) -> str:
    """`model` on CUDA: packed against exact by model and context."""
    rows = []
    for record in records:
        if record.get("op") != "model":
            continue
        packed, exact = record["packed"], record["exact"]

        def both(name: str, scale: float, form: str, packed: Any = packed, exact: Any = exact) -> str:
            cells = [format(x[name] * scale, form) if name in x else "does not fit" for x in (packed, exact)]
            return " / ".join(cells)

        def with_ratio(cell: str, name: str, record: Any = record) -> str:
            return f"{cell} ({record[name]:.2f}x)" if name in record else cell

        rows.append(
            [
                record["model"],
                count(record["context"]),
                with_ratio(both("tokens_per_s", 1, ".1f"), "decode_ratio"),
                with_ratio(both("prefill_chunk_ms", 1, ".0f"), "prefill_ratio"),
                f"{record['encode_share_of_prefill']:.1%}" if "encode_share_of_prefill" in record else None,
                both("cache_bytes", 1e-9, ".2f"),
                both("peak_bytes", 1e-9, ".1f"),
            ]
        )
    head = ["model", "context", "decode tokens/s", "prefill of 2K tokens, ms", "of it encoding", "cache GB", "peak GB"]
    return table(head, rows)


def sparse(records: list[dict[str, Any]]) -> str:
    """`sparse_attention`: one row a context, distribution and rule, beside the dense packed kernel and FP16."""
    head = ["context", "keys", "rule", "us", "scores", "threshold", "values", "page means", "dense packed", "ratio"]
    head += ["FP16", "tiles skipped", "pages unread", "bytes of dense", "dropped mass"]
    rows = []
    for r in records[1:]:
        phases = r["phases_us"]
        peer = min(r["peers_us"].values(), default=None)
        rows.append(
            [count(r["shape"]["context"]), r["distribution"], sparse_rule(r)]
            + [f"{r['us']:.0f}"]
            + [f"{phases[n]:.0f}" if n in phases else None for n in ("scores", "threshold", "attention", "page_scores")]
            + [f"{r['dense_us']:.0f}", f"{r['dense_us'] / r['us']:.2f}x", f"{peer:.0f}" if peer else None]
            + [f"{r['tiles_skipped']:.3f}", f"{r['pages_unread']:.3f}", f"{r['bytes_read'] / r['bytes_dense']:.2f}"]
            + [f"{r['dropped_mass']:.3f}"]
        )
    return table(head, rows)


def serving(records: list[dict[str, Any]]) -> str:
    """`serving_hf.py`: clients whose prompts share nothing, then clients that share a beginning."""
    names = {"packed": "our server", "transformers": "`generate`, one prompt after another"}
    rows: list[list[Any]] = []
    for r in records:
        if r["op"] == "serve":
            who = [names[r["cache"]], r["clients"], r["prompt_tokens"] // r["clients"], 0]
        elif r["op"] == "prefix":
            new = "" if r["prefix_hit_rate"] else ", first to ask"
            who = [f"`--piece {r['piece']}`{new}", r["clients"], r["prompt_tokens"] // r["clients"], r["shared_tokens"]]
        else:
            continue
        speed = [f"{r['seconds_to_first_token']:.1f}", f"{r['all_tokens_per_second']:.0f}"]
        work = f"{r['processor_seconds'] / r['clients']:.1f}"
        hits = f"{r['prefix_hit_rate']:.0%}" if "prefix_hit_rate" in r else None
        rows.append([*who, *speed, f"{r['output_tokens_per_second']:.2f}", work, hits])
    head = ["", "clients", "prompt", "of it shared", "first token, median s", "all tokens/s", "new tokens/s"]
    return table([*head, "processor s a request", "prefix hits"], rows)


def context_parallel(found: dict[str, Any]) -> str:
    """`tools/context_parallel`: one run a row, ranks beside one process."""
    rows = [
        [count(r["tokens"]), str(r["ranks"]),
         f"{max(r['bytes_per_rank']) / 1e6:.1f} / {r['bytes_alone'] / 1e6:.1f}",
         f"{r['attention_ms']:.1f} / {r['attention_ms_alone']:.1f}",
         f"{max(r['processor_ms_per_token']):.0f} / {r['processor_ms_per_token_alone']:.0f}",
         f"{r['tokens_per_second']:.1f} / {r['tokens_per_second_alone']:.1f}",
         f"{max(r['read_processor_seconds']):.1f} / {r['read_processor_seconds_alone']:.1f}",
         f"{r['largest_logit_difference']:.2f}", "yes" if r["same_tokens"] else "no"]
        for r in found["runs"]
    ]  # fmt: skip
    head = ["tokens", "ranks", "cache MB, largest rank / alone", "attention, ms a token", "processor ms a new token"]
    head += ["new tokens/s", "processor s of the prompt", "logits apart", "same tokens"]
    return table(head, rows)
