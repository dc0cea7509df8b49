"""Markdown tables of the JSON files in benchmarks/results: one function for each kind of measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; cells are shown as they are given, None as nothing."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def environment(content: Any) -> dict[str, Any]:
    """What a file says of its surroundings: its `env`, or that of its first record."""
    first = content[0] if isinstance(content, list) and content else content
    return first.get("env", {}) if isinstance(first, dict) else {}


def conditions(content: Any) -> str:
    """Machine, versions and commit in a phrase."""
    env = environment(content)
    said = []
    for name in ("device", "processor"):
        if env.get(name):
            said.append(f"{env[name]}, {env['cores']} cores" if name == "processor" and "cores" in env else env[name])
    versions = env.get("versions", env)
    said += [f"{name} {versions[name]}" for name in ("torch", "transformers", "mlx", "vllm") if name in versions]
    if env.get("commit"):
        said.append(f"commit {env['commit'].removesuffix('-dirty')[:10]}")
    return ", ".join(said) or "conditions not recorded"


def count(tokens: int) -> str:
    """131072 -> 128K."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def shape(record: dict[str, Any]) -> str:
    s = record["shape"]
    return f"{s['batch']} x {count(s['context'])}, {s['q_heads']}/{s['kv_heads']}, {s['head_dim']}"


def best_peer(record: dict[str, Any]) -> tuple[str, float]:
    return min(record["peers_us"].items(), key=lambda item: item[1])


def decode(records: list[dict[str, Any]]) -> str:
    """`decode_attention`: one row a shape, our codecs beside the fastest peer of the same run."""
    measured = [record for record in records if record.get("op") == "decode_attention"]

    def codec(record: dict[str, Any]) -> str:
        k, v = record.get("k_code"), record.get("v_code")
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


def fidelity(result: dict[str, Any]) -> str:
    """`fidelity.py`: every cache by effective bits, with the columns that were measured."""
    rows = [row for row in result["rows"] if row["name"] != "exact"]
    exact = next((row for row in result["rows"] if row["name"] == "exact"), {})
    needles = next((row["needles"] for row in rows if "needles" in row), None)
    head = ["cache", "bits"]
    if measured := any("kl" in row for row in rows):
        head += ["KL", "same top token"]
    if "perplexity" in rows[0]:
        head.append(f"perplexity (exact {exact['perplexity']:.3f})")
    if needles:
        by_length = ", ".join(f"{length}: {n['exact_pass']}/{n['of']}" for length, n in needles["by_length"].items())
        head.append(f"needles by length (exact {by_length})")
    if "mean_first_divergence" in rows[0]:
        head.append(f"first other token of {rows[0]['of']}, mean over {len(rows[0]['first_divergence'])} prompts")
    lines = []
    for row in sorted(rows, key=lambda row: row["effective_bits"]):
        name = row["name"]
        own = name.startswith("preset ")
        line = [f"**`{name.removeprefix('preset ')}`**" if own else name, f"{row['effective_bits']:.4f}"]
        if measured:
            line += [f"{row['kl']:.4f}", f"{row['same_top']:.1%}"] if "kl" in row else ["", ""]
        if "perplexity" in row:
            line.append(f"{row['perplexity']:.3f}")
        if needles:
            by = row["needles"]["by_length"].values() if "needles" in row else ()
            line.append(" ".join(str(n["pass"]) for n in by))
        if "mean_first_divergence" in row:
            line.append(f"{row['mean_first_divergence']:.1f}")
        lines.append(line)
    return table(head, lines)


def fidelity_texts(result: dict[str, Any]) -> str:
    """`fidelity.py`: KL by kind of text."""
    rows = [row for row in result["rows"] if row["name"] != "exact" and "texts" in row]
    names = list(rows[0]["texts"])
    return table(
        ["cache", "bits", "KL", *names],
        [
            [
                row["name"].removeprefix("preset "),
                f"{row['effective_bits']:.4f}",
                f"{row['kl']:.4f}",
                *(f"{row['texts'][name]['kl']:.4f}" for name in names),
            ]
            for row in rows
        ],
    )


def canaries(result: dict[str, Any]) -> str:
    """`fidelity.py`: KL of caches on models whose keys were made harder, and that over the plain model's."""
    plain = {row["name"]: row.get("kl") for row in result["rows"]}
    found = result["canaries"]
    models = list(dict.fromkeys(row["canary"] for row in found))
    names = list(dict.fromkeys(row["name"] for row in found))
    lines = []
    for name in names:
        own = {row["canary"]: row["kl"] for row in found if row["name"] == name}
        usual = plain.get(name)
        line = [name.removeprefix("preset "), f"{usual:.4f}" if usual is not None else ""]
        for canary in models:
            times = f" ({own[canary] / usual:.2f}x)" if usual and not canary.startswith("random") else ""
            line.append(f"{own[canary]:.4f}{times}" if canary in own else "")
        lines.append(line)
    return table(["cache", "the model itself", *models], lines)


def induction(result: dict[str, Any]) -> str:
    """`induction.py`: recall of the constructed model by length and cache."""
    lines = []
    for row in result["rows"]:
        if "error" in row:
            lines.append([f"{row['length']:,}", row["cache"], "", row["error"], "", "", "", ""])
            continue
        lines.append(
            [
                f"{row['length']:,}",
                row["cache"],
                f"{row['bits']:.4g}",
                f"{row['found']} of {row['of']}",
                f"{row['least_margin']:.3f}",
                f"{row['cache_bytes'] / 1e6:,.1f}",
                f"{row['read_seconds']:.1f}",
                f"{row['ask_seconds'] / row['of'] * 1e3:.1f}",
            ]
        )
    return table(["tokens", "cache", "bits", "found", "least margin", "MB", "read s", "ms a question"], lines)


def plan(result: dict[str, Any]) -> str:
    """`forgeattn plan`: the longest context by machine and cache."""
    machines = result["machines"]
    names = [row["cache"] for row in next(iter(machines.values()))]

    def said(tokens: int | None) -> str:
        return "any" if tokens is None else "no room" if tokens == 0 else f"{tokens:,}"

    lines = [[machine, *(said(row["context"]) for row in rows)] for machine, rows in machines.items()]
    per_token = [f"{row['bytes_per_token']:,.0f}" for row in next(iter(machines.values()))]
    return table(["memory", *names], [*lines, ["bytes per token", *per_token]])


def ruler(result: dict[str, Any]) -> str:
    """`forgeattn eval ruler`: scores by task and length."""
    lines = [[row["task"], row["length"], f"{row['exact']:.1f}", f"{row['packed']:.1f}"] for row in result["rows"]]
    mean = result["mean"]
    return table(
        ["task", "tokens", "exact", "packed"], [*lines, ["mean", "", f"{mean['exact']:.1f}", f"{mean['packed']:.1f}"]]
    )


def niah(result: dict[str, Any]) -> str:
    """`forgeattn eval niah`: needles found by test."""
    rows = [[name, n["of"], n["exact_pass"], n["packed_pass"], n["kept"]] for name, n in result["tests"].items()]
    return table(["test", "questions", "exact finds", "packed finds", "kept of the exact one's"], rows)


def kl(result: dict[str, Any]) -> str:
    """`forgeattn eval kl`: by position, and the layers whose attention output errs most."""
    parts = table(
        ["positions", "KL", "same top token", "perplexity", "exact"],
        [
            [
                f"{part['start']} to {part['stop']}",
                f"{part['kl']:.4f}",
                f"{part['same_top']:.1%}",
                f"{part['perplexity']:.3f}",
                f"{part['exact_perplexity']:.3f}",
            ]
            for part in result["parts"]
        ],
    )
    worst = sorted(result["layers"], key=lambda row: -row["error"])[:5]
    if not worst:
        return parts
    mean = sum(row["error"] for row in result["layers"]) / len(result["layers"])
    said = ", ".join(f"layer {row['layer']} {row['error']:.3f}" for row in worst)
    return f"{parts}\n\nRelative error of the attention output, mean over layers {mean:.3f}; largest: {said}."


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
            [count(r["shape"]["context"]), r["distribution"], f"{'fast ' if r.get('fast') else ''}top-{r['top_k']}"]
            + [f"{r['us']:.0f}"]
            + [f"{phases[n]:.0f}" if n in phases else None for n in ("scores", "threshold", "attention", "page_scores")]
            + [f"{r['dense_us']:.0f}", f"{r['dense_us'] / r['us']:.2f}x", f"{peer:.0f}" if peer else None]
            + [f"{r['tiles_skipped']:.3f}", f"{r['pages_unread']:.3f}", f"{r['bytes_read'] / r['bytes_dense']:.2f}"]
            + [f"{r['dropped_mass']:.3f}"]
        )
    return table(head, rows)


def sparse_fidelity(content: dict[str, Any]) -> str:
    """`sparse_fidelity`: one row a rule."""
    head = ["rule", "KL", "rise", "same top token", "needles", "kept tokens", "dropped mass", "worst", "bytes of dense"]
    return table(
        head,
        [
            [r["rule"], f"{r['kl']:.5f}", f"{r['kl_rise']:+.5f}", f"{r['same_top']:.1%}", f"{r['needles']}/{r['of']}"]
            + [
                f"{r[n]:.{d}f}" if n in r else None
                for n, d in (("kept_tokens", 0), ("dropped_mass", 4), ("dropped_mass_worst", 4), ("share_of_bytes", 3))
            ]
            for r in content["rows"]
        ],
    )


def eviction(content: Any) -> str:
    """Rows of eviction.py: what was kept and what it cost."""

    def mean(values: Iterable[float]) -> float:
        values = list(values)
        return sum(values) / len(values)

    rows = []
    for row in content["rows"]:
        worse = mean(row["perplexity"][t] / row["exact_perplexity"][t] - 1 for t in row["perplexity"])
        how = [row["policy"] or "keep all", *(str(row[k]) for k in ("granularity", "join", "on_evict") if k in row)]
        rows.append((
            row["cache"], ", ".join(how), f"{row.get('retention', 1.0):.0%}", f"{mean(row['kl'].values()):.4f}",
            f"{mean(row['same_top'].values()):.1%}", f"{worse:+.2%}", f"{row['passed']} of {len(row['needles'])}",
        ))  # fmt: skip
    head = ("cache", "policy", "kept", "KL", "same top token", "perplexity", "needles")
    return table(head, rows)


RENDERERS: dict[str, Callable[[Any], str]] = {
    "canaries": canaries,
    "cuda_model": cuda_model,
    "cuda_prefill": cuda_prefill,
    "decode": decode,
    "encode": encode,
    "eviction": eviction,
    "fidelity": fidelity,
    "fidelity_texts": fidelity_texts,
    "induction": induction,
    "kl": kl,
    "mlx": mlx,
    "model": model,
    "niah": niah,
    "plan": plan,
    "prefill": prefill,
    "sparse": sparse,
    "sparse_fidelity": sparse_fidelity,
    "ruler": ruler,
}
