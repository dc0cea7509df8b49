"""Markdown tables of the JSON files in benchmarks/results: one function for each kind of measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
        names = {record[side] for side in ("k_code", "v_code") if side in record}
        return "default" if not names else "scalar" if names == {"scalar"} else "trellis"

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
    """`fidelity.py`: every cache by effective bits."""
    rows = result["rows"]
    full = any("needles" in row for row in rows)
    head = ["cache", "bits", "KL", "same top token"]
    if any("perplexity" in row for row in rows):
        head.append(f"perplexity (exact {rows[0]['exact_perplexity']:.3f})")
    if full:
        exact = next(row["needles"] for row in rows if "needles" in row)
        head.append(f"needles of {exact['of']} (exact {exact['exact_pass']})")
    if any("mean_first_divergence" in row for row in rows):
        head.append(f"first other token, mean of {len(rows[0]['first_divergence'])} (at most {rows[0]['of']})")
    lines = []
    for row in sorted(rows, key=lambda row: row["effective_bits"]):
        name = row["name"]
        own = name.startswith("preset ")
        line = [f"**`{name.removeprefix('preset ')}`**" if own else name, f"{row['effective_bits']:.4g}"]
        line += [f"{row['kl']:.4f}", f"{row['same_top']:.1%}"]
        if "perplexity" in row:
            line.append(f"{row['perplexity']:.3f}")
        if full:
            line.append(row["needles"]["pass"] if "needles" in row else "")
        if "mean_first_divergence" in row:
            line.append(f"{row['mean_first_divergence']:.1f}")
        lines.append(line)
    return table(head, lines)


RENDERERS: dict[str, Callable[[Any], str]] = {
    "decode": decode,
    "fidelity": fidelity,
    "model": model,
    "prefill": prefill,
}
