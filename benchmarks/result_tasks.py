"""Markdown tables of what is measured on the real models: HumanEval, RULER, needles and long answers."""

from __future__ import annotations

from typing import Any

from result_format import table

Row = dict[str, Any]


def named(cache: str) -> str:
    """A cache's name in a table; ours stand out."""
    return f"**`{cache.removeprefix('preset ')}`**" if cache.startswith("preset ") else cache


def _in_order(rows: list[Row]) -> list[str]:
    """Caches by bits, the exact one first."""
    bits = {row["cache"]: row["bits"] for row in rows}
    return sorted(bits, key=lambda cache: (cache != "exact", bits[cache]))


def humaneval(result: Row) -> str:
    """`humaneval.py`: problems that pass alone and behind other code, and which of them the exact cache's answers do
    not pass, or do."""
    rows = result["rows"]
    lengths = sorted({row["length"] for row in rows})
    head = ["cache", "bits"]
    for length in lengths:
        head += [f"passed behind {length:,} tokens" if length else "passed", "against exact"]
    lines = []
    for cache in _in_order(rows):
        line = [named(cache), f"{next(row['bits'] for row in rows if row['cache'] == cache):.3f}"]
        for length in lengths:
            here = {row["cache"]: row for row in rows if row["length"] == length}
            if cache not in here:
                line += ["", ""]
                continue
            row, exact = here[cache], set(here["exact"]["failed"])
            lost, won = set(row["failed"]) - exact, exact - set(row["failed"])
            against = "" if cache == "exact" else f"{len(lost)} lost, {len(won)} won"
            line += [f"{row['passed']} of {row['of']}", against]
        lines.append(line)
    return table(head, lines)


def by_length(result: Row) -> str:
    """`long_tasks.py`: RULER's mean score, or needles found, by cache and length."""
    rows = result["rows"]
    lengths = sorted({row["length"] for row in rows})
    scored = [row for row in rows if "score" in row]
    lines = []
    for cache in _in_order(rows):
        own = [row for row in rows if row["cache"] == cache]
        line = [named(cache), f"{own[0]['bits']:.3f}"]
        for length in lengths:
            here = [row for row in own if row["length"] == length]
            line.append(_cell(here, scored))
        lines.append(line)
    return table(["cache", "bits", *(f"{length:,}" for length in lengths)], lines)


def by_task(result: Row) -> str:
    """`long_tasks.py`: the same by task, over all lengths that every cache was asked at."""
    rows = result["rows"]
    caches = _in_order(rows)
    asked = [{(row["task"], row["length"]) for row in rows if row["cache"] == cache} for cache in caches]
    common = set.intersection(*asked)
    scored = [row for row in rows if "score" in row]
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task and (task, row["length"]) in common]
        line = [task, ", ".join(f"{n:,}" for n in sorted({row["length"] for row in own}))]
        line += [_cell([row for row in own if row["cache"] == cache], scored) for cache in caches]
        lines.append(line)
    return table(["task", "tokens", *map(named, caches)], lines)


def _cell(rows: list[Row], scored: list[Row]) -> str:
    if not rows:
        return ""
    if scored:
        return f"{sum(row['score'] for row in rows) / len(rows):.1f}"
    return f"{sum(row['passed'] for row in rows)} of {sum(row['of'] for row in rows)}"


def long_decode(result: Row) -> str:
    """`long_decode.py`: agreement with the exact cache's answers, repetition, likelihood under the exact model."""
    rows = {row["cache"]: row for row in result["rows"]}
    lines = []
    for cache in _in_order(result["rows"]):
        row = rows[cache]
        lines.append([
            named(cache), f"{row['bits']:.3f}", f"{row['agreement']:.1%}", f"{row['repetition']:.1%}",
            f"{row['log_likelihood']:.4f}",
        ])  # fmt: skip
    head = ["cache", "bits", "tokens before the first other one, of 1,000", "4-grams said before", "log-likelihood"]
    return table(head, lines)


def by_position(result: Row) -> str:
    """`fidelity.py` on long documents: KL by position."""
    rows = [row for row in result["rows"] if row.get("by_position") and row["name"] != "exact"]
    head = [f"{part['start']:,} to {part['stop']:,}" for part in rows[0]["by_position"]]
    lines = [
        [named(row["name"]), f"{row['effective_bits']:.3f}", *(f"{part['kl']:.4f}" for part in row["by_position"])]
        for row in sorted(rows, key=lambda row: row["effective_bits"])
    ]
    return table(["cache", "bits", *head], lines)


RENDERERS = {
    "by_length": by_length,
    "by_position": by_position,
    "by_task": by_task,
    "humaneval": humaneval,
    "long_decode": long_decode,
}
