"""The report of a self-test as one page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib import resources
from string import Template
from typing import Any

COLUMNS: dict[str, tuple[str, ...]] = {
    "ops": ("codec", "head_dim", "group", "op", "dtype", "error", "limit", "first_ms", "again_ms"),
    "decode": ("context", "ours_us", "share_of_copy", "mlx float16", "mlx-lm 8 bit", "mlx-lm 4 bit", "ratio", "error"),
    "needles": ("cache", "depth", "found", "answer"),
    "generation": ("cache", "prompt_tokens", "prompt_tps", "generation_tps", "peak_gb", "cache_mb"),
}
"""What of a step's rows is shown."""


def page(report: dict[str, Any]) -> str:
    """The page of `selftest.run`'s report."""
    text = resources.files("forgeattention.tools").joinpath("templates", "selftest.html").read_text(encoding="utf-8")
    machine = report["machine"]
    states = [found["status"] for found in report["steps"].values()]
    verdict = ", ".join(
        f"{states.count(state)} {state}" for state in ("passed", "failed", "skipped") if state in states
    )
    env = report["env"]
    about = [f"{name} {version}" for name, version in env["versions"].items()]
    about += [f"commit {env.get('commit') or 'unknown'}", f"device {report['device']}", f"{report['seconds']:.0f} s"]
    return Template(text).substitute(
        machine=html.escape(", ".join(str(x) for x in machine.values())),
        verdict=html.escape(verdict),
        sections="\n".join(_section(name, found) for name, found in report["steps"].items()),
        environment=html.escape(", ".join(about)),
    )


def _section(name: str, found: dict[str, Any]) -> str:
    said = found.get("reason") or ""
    parts = [
        f'<h2>{name}: <span class="{found["status"]}">{found["status"]}</span></h2>',
        f"<p>{html.escape(said)}</p>",
    ]
    if rows := found.get("rows"):
        parts.append(_table(COLUMNS[name], rows))
    for fault in sorted({row["fault"] for row in rows or [] if "fault" in row}):
        parts.append(f"<pre>{html.escape(fault)}</pre>")
    if "stderr" in found:
        parts.append(f"<pre>{html.escape(found['stderr'])}</pre>")
    return "\n".join(parts)


def _table(columns: Sequence[str], rows: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in columns)
    lines = []
    for row in rows:
        wrong = "fault" in row or ("error" in row and "limit" in row and row["error"] > row["limit"])
        cells = "".join(f"<td>{html.escape(_cell(row.get(name)))}</td>" for name in columns)
        lines.append(f'<tr class="failed">{cells}</tr>' if wrong else f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>\n' + "\n".join(lines) + "\n</table></div>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
