"""What the tables of docs/results.md are made with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    queries = f", {s['q_len']} queries" if 1 < s.get("q_len", 1) <= 16 else ""
    return f"{s['batch']} x {count(s['context'])}, {s['q_heads']}/{s['kv_heads']}, {s['head_dim']}{queries}"


def sparse_rule(record: dict[str, Any]) -> str:
    """Which tokens a `sparse_attention` record kept."""
    if "top_p" in record:
        return f"top-p {record['top_p']}"
    return f"{'fast ' if record.get('fast') else ''}top-{record['top_k']}"


def best_peer(record: dict[str, Any]) -> tuple[str, float]:
    return min(record["peers_us"].items(), key=lambda item: item[1])
