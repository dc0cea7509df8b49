"""Markdown tables of the JSON files in benchmarks/results: one function for each kind of measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import result_speed
import result_tasks
from result_format import table


def fidelity(result: dict[str, Any]) -> str:
    """`fidelity.py`: every cache by effective bits, with the columns that were measured."""
    rows = [row for row in result["rows"] if row["name"] != "exact"]
    exact = next((row for row in result["rows"] if row["name"] == "exact"), {})
    needles = next((row["needles"] for row in rows if "needles" in row), None)
    head = ["cache", "bits"]
    if measured := any("kl" in row for row in rows):
        head += ["KL", "same top token"]
    if parts := any("kl_99" in row for row in rows):
        head += ["KL median", "99 %", "99.9 %"]
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
        if parts:
            line += [f"{row[name]:.4f}" if name in row else "" for name in ("kl_median", "kl_99", "kl_999")]
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
    for row in sorted(content["rows"], key=lambda row: (-row.get("retention", 1.0), row["cache"], row["policy"] or "")):
        worse = mean(row["perplexity"][t] / row["exact_perplexity"][t] - 1 for t in row["perplexity"])
        how = [row["policy"] or "keep all", *(str(row[k]) for k in ("granularity", "join", "on_evict") if k in row)]
        rows.append((
            row["cache"], ", ".join(how), f"{row.get('retention', 1.0):.0%}", f"{mean(row['kl'].values()):.4f}",
            f"{mean(row['same_top'].values()):.1%}", f"{worse:+.2%}", f"{row['passed']} of {len(row['needles'])}",
        ))  # fmt: skip
    head = ("cache", "policy", "kept", "KL", "same top token", "perplexity", "needles")
    return table(head, rows)


def eviction_time(content: Any) -> str:
    """What rounds of `eviction.py time` cost, beside a cache that keeps all."""
    base = content["time"][0]
    rows = []
    for row in content["time"]:
        took = [
            f"{row[n] / 1e3:.1f} ({row[n] / base[n]:.2f}x)" for n in ("prefill_us_per_token", "decode_us_per_token")
        ]
        counts = row["counts"] or {}
        moved = [str(counts.get(name, "")) for name in ("evicted", "recalled")]
        rows.append([row["evict"] or "keep all", *took, f"{row['bytes_per_token']:.0f}", *moved])
    head = [
        "policy",
        "ms a token, prompt",
        "ms a token, decoding",
        "bytes of cache a token",
        "pages evicted",
        "recalled",
    ]
    return table(head, rows)


RENDERERS: dict[str, Callable[[Any], str]] = {
    **result_tasks.RENDERERS,
    "canaries": canaries,
    "context_parallel": result_speed.context_parallel,
    "cuda_model": result_speed.cuda_model,
    "cuda_prefill": result_speed.cuda_prefill,
    "decode": result_speed.decode,
    "encode": result_speed.encode,
    "eviction": eviction,
    "eviction_time": eviction_time,
    "fidelity": fidelity,
    "fidelity_texts": fidelity_texts,
    "induction": induction,
    "kl": kl,
    "mlx": result_speed.mlx,
    "model": result_speed.model,
    "niah": niah,
    "plan": plan,
    "prefill": result_speed.prefill,
    "serving": result_speed.serving,
    "sparse": result_speed.sparse,
    "sparse_fidelity": sparse_fidelity,
    "ruler": ruler,
}
