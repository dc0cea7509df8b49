"""The report's page: one HTML file that needs nothing else, made from the results alone."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any

from .needles import Outcome

COLOURS = {"exact": "#6b7280", "packed": "#d9480f"}
TITLES = {
    "sparse": "Sparse reading",
    "eviction": "Eviction",
    "ruler": "RULER",
    "induction": "The constructed model at length",
}
Row = Mapping[str, Any]


def render(result: Mapping[str, Any]) -> tuple[str, dict[str, bytes]]:
    """The page and its charts.

    Args:
        result: what `forgeattn report` writes to report.json; parts that are missing are left out of the page.

    Returns:
        HTML with the charts inside, and the charts as PNG by name.
    """
    charts: dict[str, bytes] = {}
    sections = []
    if needles := result.get("niah"):
        sections.append(section("Needles", _heat(needles["cells"]) + _tests(needles["tests"])))
    if rows := result.get("kl"):
        charts["kl"] = _frontier(rows)
        figures = table(rows, ("preset", "bits", "kl", "same_top", "perplexity", "exact_perplexity"))
        about = f"<p>Mean over {rows[0]['positions']:,} positions of {escaped(rows[0]['text'])}; KL in nats.</p>"
        sections.append(section("Fidelity", about + image(charts["kl"], "KL against bits per element") + figures))
    for name, title, unit in (
        ("memory", "Memory against context", "cache, MB"),
        ("speed", "Speed against context", "tokens/s"),
    ):
        if rows := result.get(name):
            charts[name] = _lines(rows, unit)
            picture = image(charts[name], f"{unit} of both caches against tokens of context")
            sections.append(section(title, picture + table(rows)))
    for name, title in TITLES.items():
        if rows := result.get(name):
            sections.append(section(title, table(rows)))
    about = measured_with(result["env"])
    filled = fill(result["model"], verdict(result), sections, about)
    return filled, charts


def fill(model: str, said: str, sections: Sequence[str], about: str) -> str:
    """The page of a model: what it said in a sentence, its sections, and what was measured with."""
    folder = resources.files("forgeattention.tools").joinpath("templates")
    return Template(folder.joinpath("report.html").read_text(encoding="utf-8")).substitute(
        model=escaped(model), verdict=escaped(said), sections="\n".join(sections), environment=escaped(about)
    )


def measured_with(env: Row) -> str:
    """Versions, machine and commit in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    where = ", ".join(str(env[name]) for name in ("device", "processor") if env.get(name))
    return f"{versions}; {where}, {env['cores']} cores; {env['machine']}; commit {env['commit'] or 'unknown'}"


def verdict(result: Mapping[str, Any]) -> str:
    """The outcome in a sentence or two, from the figures alone."""
    parts = []
    bits = result["effective_bits"]
    if rows := result.get("memory"):
        last = rows[-1]
        parts.append(
            f"At {last['context']:,} tokens the packed cache ({bits:.2f} bits per element) takes "
            f"{last['exact'] / last['packed']:.1f}x less memory than the exact one"
        )
    else:
        parts.append(f"The packed cache takes {bits:.2f} bits per element")
    if needles := result.get("niah"):
        found, kept = needles["exact_pass"], needles["kept"]
        if found == 0:
            parts.append(
                f"the model finds none of {needles['of']} needles even with the exact cache, so they say nothing"
            )
        else:
            whole = "all" if kept == found else f"{kept} of"
            parts.append(f"keeps {whole} the {found} needles (of {needles['of']}) that the exact cache finds")
    if rows := result.get("kl"):
        own = next((row for row in rows if row["preset"] == result["preset"]), rows[0])
        parts.append(f"bends predictions by {own['kl']:.4f} nats and leaves {own['same_top']:.1%} of the top tokens")
    if rows := result.get("speed"):
        last = rows[-1]
        parts.append(
            f"decodes {last['packed'] / last['exact']:.2f}x as fast as the exact one at {last['context']:,} tokens"
        )
    return f"{'; '.join(parts)}."


def _heat(cells: Sequence[Row]) -> str:
    """Depth by length, one table per test: share of questions that both caches pass."""
    out = []
    for test in dict.fromkeys(cell["test"] for cell in cells):
        own = [cell for cell in cells if cell["test"] == test]
        lengths = sorted({(cell["length"], cell["haystack"]) for cell in own})
        several = len({hay for _, hay in lengths}) > 1
        head = "".join(f"<th>{n:,}{' ' + escaped(hay) if several else ''}</th>" for n, hay in lengths)
        lines = []
        for depth in sorted({cell["depth"] for cell in own}):
            line = ""
            for length, hay in lengths:
                at = [c for c in own if (c["length"], c["haystack"], c["depth"]) == (length, hay, depth)]
                line += _heat_cell(at)
            lines.append(f"<tr><th>{depth:.0%}</th>{line}</tr>")
        out.append(
            f"<h3>{escaped(test)}</h3><div class='wide'>"
            f"<table class='heat'><thead><tr><th>depth</th>{head}</tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table></div>"
        )
    legend = " ".join(
        f"<span class='{name}'>&nbsp;{text}&nbsp;</span>"
        for name, text in (("PASS", "kept"), ("LOST", "lost"), ("ONLY", "packed only"), ("NEITHER", "neither finds it"))
    )
    return f"<p>{legend}</p>" + "".join(out)


def _heat_cell(cells: Sequence[Row]) -> str:
    if not cells:
        return "<td></td>"
    exact = [cell["exact"] == Outcome.PASS for cell in cells]
    packed = [cell["packed"] == Outcome.PASS for cell in cells]
    if any(a and not b for a, b in zip(exact, packed)):
        kind = "LOST"
    elif any(exact):
        kind = "PASS"
    else:
        kind = "ONLY" if any(packed) else "NEITHER"
    said = cells[0]["packed"] if len(cells) == 1 else f"{sum(packed)}/{len(cells)}"
    return f"<td class='{kind}'>{escaped(said)}</td>"


def _tests(tests: Mapping[str, Row]) -> str:
    rows = [
        {"test": name, "questions": n["of"], "exact finds": n["exact_pass"], "packed finds": n["packed_pass"],
         "kept": n["kept"]}
        for name, n in tests.items()
    ]  # fmt: skip
    return table(rows)


def table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """A table of the columns named, or of all that hold single values."""
    if columns is None:
        columns = [key for key, value in rows[0].items() if not isinstance(value, list | dict)]
    head = "".join(f"<th>{escaped(name.replace('_', ' '))}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(_cell(row.get(name)) for name in columns)}</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return f"<td>{escaped('' if value is None else value)}</td>"
    if isinstance(value, int):
        return f"<td class='n'>{value:,}</td>"
    digits = 4 if value == 0 or abs(value) < 1 else max(0, 4 - int(math.log10(abs(value))) - 1)
    return f"<td class='n'>{value:,.{digits}f}</td>"


def section(title: str, body: str) -> str:
    return f"<section><h2>{escaped(title)}</h2>\n{body}</section>"


def image(png: bytes, alt: str) -> str:
    return f'<img alt="{escaped(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def escaped(value: Any) -> str:
    return html.escape(str(value))


def _frontier(rows: Sequence[Row]) -> bytes:
    figure, axis = axes("bits per element", "KL to the exact cache, nats")
    axis.plot([row["bits"] for row in rows], [row["kl"] for row in rows], "o", color=COLOURS["packed"])
    for row in rows:
        axis.annotate(row["preset"], (row["bits"], row["kl"]), xytext=(6, 4), textcoords="offset points")
    if all(row["kl"] > 0 for row in rows):
        axis.set_yscale("log")
    axis.margins(x=0.2)
    return png(figure)


def _lines(rows: Sequence[Row], unit: str) -> bytes:
    figure, axis = axes("tokens of context", unit)
    scale = 1e6 if "MB" in unit else 1
    for name, colour in COLOURS.items():
        known = [(row["context"], row[name] / scale) for row in rows if row.get(name) is not None]
        axis.plot(*zip(*known), "o-", color=colour, label=name)
    axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    axis.legend(frameon=False)
    return png(figure)


def axes(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()
