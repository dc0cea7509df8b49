"""`forgeattn report --results FILE ...`: a page for each model, made from what the benchmarks measured of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...util.files import read_json
from . import page

Row = Mapping[str, Any]
TASKS = ("passed", "score")
"""Fields of rows of a task: questions passed, or RULER's score."""


def run(files: Sequence[Path], output: Path) -> dict[str, Any]:
    """Writes MODEL.html for every model of the results, and tells which files are of no model's cache.

    Args:
        files: JSON of `fidelity.py`, `humaneval.py`, `long_tasks.py` or `long_decode.py` in benchmarks/.
        output: folder of the pages.

    Returns:
        The files that each model's page was made from, by model.

    Raises:
        ValueError: a file that is not there or no JSON, or none with results of a model's cache.
    """
    by_model: dict[str, list[tuple[Path, Any]]] = {}
    left = []
    for file in files:
        content = read_result(file)
        model = content.get("model") if isinstance(content, dict) else None
        if isinstance(model, str) and kind(content) is not None:
            by_model.setdefault(_named(model), []).append((file, content))
        else:
            left.append(file.name)
    if not by_model:
        raise ValueError(f"[report] expected results of a model's cache; got {[file.name for file in files]}")
    output.mkdir(parents=True, exist_ok=True)
    for model, found in by_model.items():
        path = output / f"{re.sub('[^A-Za-z0-9._-]+', '-', model)}.html"
        path.write_text(render(model, found), encoding="utf-8")
        print(f"{path}: {verdict([content for _, content in found])}")
    if left:
        print(f"left out, since they hold no results of a model's cache: {', '.join(left)}")
    return {model: [file.name for file, _ in found] for model, found in by_model.items()}


def _named(model: str) -> str:
    """One name for one model: results call SmolLM2 by its file's name, too."""
    name = Path(model).stem if model.endswith(".gguf") else model
    return "smollm2" if name.startswith("SmolLM2-135M-Instruct") else name


def kind(content: Row) -> str | None:
    """What a result is of: "fidelity", "tasks", "long decode", or None for anything else."""
    rows = content.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows) or "env" not in content:
        return None
    row = rows[-1]
    if {"name", "effective_bits", "kl"} <= row.keys():
        return "fidelity"
    if {"cache", "bits", "task", "length"} <= row.keys():
        return "tasks" if any(name in row for name in TASKS) else "long decode" if "agreement" in row else None
    return None


def render(model: str, found: Sequence[tuple[Path, Any]]) -> str:
    """The page of a model from its results, fidelity first."""
    order = ("fidelity", "tasks", "long decode")
    found = sorted(found, key=lambda pair: (order.index(str(kind(pair[1]))), pair[0].name))
    sections = []
    for file, content in found:
        what = kind(content)
        body = _fidelity(content) if what == "fidelity" else _tasks(content) if what == "tasks" else _decode(content)
        about = f"<p><small>{page.escaped(file.name)}: {page.escaped(page.measured_with(content['env']))}</small></p>"
        sections.append(page.section(_title(content), body + about))
    digests = sorted({content["sha256"] for _, content in found if "sha256" in content})
    about = f"sha256 of the model: {', '.join(digests)}" if digests else "a model that is no single file"
    return page.fill(model, verdict([content for _, content in found]), sections, about)


def verdict(results: Sequence[Row]) -> str:
    """What the default cache costs, in a sentence or two, from the figures alone."""
    said: list[str] = []
    for content in results:
        rows = content["rows"]
        if kind(content) == "fidelity":
            ours = next((row for row in rows if row["name"] == "preset balanced"), None)
            if ours is None or said:
                continue
            said.append(
                f"`balanced` at {ours['effective_bits']:.3g} bits per element bends predictions by {ours['kl']:.4f} "
                f"nats and leaves {ours['same_top']:.1%} of the top tokens"
            )
            peers = [row for row in rows if row.get("kind") == "peer" and row["effective_bits"] <= 4.5]
            if peers:
                best = min(peers, key=lambda row: row["kl"])
                said.append(
                    f"the best other cache of at most 4.5 bits ({best['name']}, {best['effective_bits']:.3g} bits) "
                    f"by {best['kl']:.4f}"
                )
        elif kind(content) == "tasks" and rows[0]["task"] == "humaneval":
            alone = {row["cache"]: row for row in rows if row["length"] == 0}
            if {"exact", "preset balanced"} <= alone.keys():
                ours, exact = alone["preset balanced"], alone["exact"]
                said.append(f"HumanEval {ours['passed']} of {ours['of']}, the exact cache {exact['passed']}")
    return f"{'; '.join(said)}." if said else "No result of the default cache."


def _title(content: Row) -> str:
    what, setting = kind(content), content.get("setting", {})
    if what == "fidelity":
        bare = " without exact tokens" if setting.get("no_exact_tokens") else ""
        return f"Fidelity{', caches fitted by a text' if setting.get('fitted') else ''}{bare}"
    if what == "tasks":
        row = content["rows"][0]
        return "HumanEval" if row["task"] == "humaneval" else "RULER" if "score" in row else "Needles"
    return "Long answers"


def _fidelity(content: Row) -> str:
    columns = ("cache", "bits", "KL", "median", "99 %", "99.9 %", "same top token", "perplexity")
    keys = ("name", "effective_bits", "kl", "kl_median", "kl_99", "kl_999", "same_top", "perplexity")
    rows = [dict(zip(columns, (row.get(key) for key in keys))) for row in content["rows"] if "kl" in row]
    setting = content.get("setting", {})
    about = f"{content['rows'][0].get('positions', 0):,} positions of {', '.join(setting.get('texts', []))}"
    if setting.get("no_exact_tokens"):
        about += "; no cache keeps exact tokens"
    picture = page.image(frontier(content["rows"]), "KL against bits per element")
    out = f"<p>{page.escaped(about)}; KL in nats.</p>" + picture + page.table(rows)
    spread = [row for row in content["rows"] if row.get("by_position") and row["name"] != "exact"]
    if spread:
        at = [
            {"cache": row["name"], **{f"{part['start']} to {part['stop']}": part["kl"] for part in row["by_position"]}}
            for row in spread
        ]
        out += "<h3>KL by position</h3>" + page.table(at)
    return out


def _tasks(content: Row) -> str:
    """A line for each task and length, a column for each cache."""
    caches = dict.fromkeys(row["cache"] for row in content["rows"])
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for row in content["rows"]:
        line = lines.setdefault((row["task"], row["length"]), {"task": row["task"], "tokens": row["length"]})
        line[row["cache"]] = f"{row['passed']} of {row['of']}" if "passed" in row else float(row["score"])
    return page.table(list(lines.values()), ["task", "tokens", *caches])


def _decode(content: Row) -> str:
    return page.table(content["rows"], ("cache", "bits", "length", "agreement", "repetition", "log_likelihood"))


def frontier(rows: Sequence[Row]) -> bytes:
    """KL against bits, ours and others', as a PNG."""
    figure, axis = page.axes("bits per element", "KL to the exact cache, nats")
    for row in rows:
        if row.get("kl", 0) > 0 and row.get("kind") not in ("exact", "variant"):
            own = row.get("kind") != "peer"
            at = row["effective_bits"], row["kl"]
            axis.plot(*at, "o", color=page.COLOURS["packed" if own else "exact"])
            if own:
                name = row["name"].removeprefix("preset ")
                axis.annotate(name, at, xytext=(6, 4), textcoords="offset points", fontsize=8)
    axis.set_yscale("log")
    return page.png(figure)


def read_result(file: Path) -> Any:
    """The JSON of a run. Raises ValueError where there is none."""
    if not file.is_file():
        raise ValueError(f"[report] expected a JSON file; got {str(file)!r}")
    return read_json(file, "report", "a run's JSON")
