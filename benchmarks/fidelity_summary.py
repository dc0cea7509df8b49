"""What fidelity.py measured, summed up: rows by cache and by canary, lines for the terminal, the frontier plot.

Results of one model on the same documents are joined:

    python benchmarks/fidelity_summary.py A.json B.json --json OUT --plot PNG
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fidelity_measure import unpack

from forgeattention.util.environment import environment
from forgeattention.util.files import write_json

Row = dict[str, Any]
QUANTILES = {"kl_median": 0.5, "kl_99": 0.99, "kl_999": 0.999}


def summary(args: argparse.Namespace, measured: list[Row]) -> dict[str, Any]:
    """Rows by cache, sorted by effective bits, and by canary and cache."""
    rows, exact = [], _cells(measured, "exact")
    for name in dict.fromkeys(row["name"] for row in measured):
        own = [row for row in measured if row["name"] == name]
        by_text: dict[str, list[Row]] = {}
        for row in own:
            if row["item"][0] == "text":
                by_text.setdefault(row["item"][1], []).append(row)
        means = {
            text: {
                "positions": (positions := sum(row["positions"] for row in pieces)),
                **{
                    key: sum(row[key] * row["positions"] for row in pieces) / positions
                    for key in ("kl", "same_top", "loss")
                },
            }
            for text, pieces in by_text.items()
        }
        out: Row = {"name": name, "kind": own[0]["kind"], "bits": own[0]["bits"], "effective_bits": own[0]["bits"]}
        if means:
            out |= _over_texts(means)
            out |= _over_positions([row for row in own if row["item"][0] == "text" and "each" in row])
        if cells := _cells(measured, name):
            found = {where for where, outcome in cells.items() if outcome == "PASS"}
            exact_found = {where for where, outcome in exact.items() if outcome == "PASS"}
            lengths = sorted({int(where.split()[0]) for where in cells})
            out["needles"] = {
                "of": len(cells),
                "pass": len(found),
                "exact_pass": len(exact_found),
                "kept": len(found & exact_found),
                "by_length": {
                    length: {
                        "of": sum(where.startswith(f"{length} ") for where in cells),
                        "pass": sum(where.startswith(f"{length} ") for where in found),
                        "exact_pass": sum(where.startswith(f"{length} ") for where in exact_found),
                    }
                    for length in lengths
                },
                "cells": cells,
            }
        replies = [row for row in own if row["item"][0] == "greedy"]
        if first := [n for row in replies for n in row["first_divergence"]]:
            out |= {"first_divergence": first, "mean_first_divergence": _mean(first), "of": replies[0]["of"]}
        rows.append(out)
    broken: dict[tuple[str, str], list[Row]] = {}
    for row in measured:
        if row["item"][0] == "canary" and row["name"] != "exact":
            broken.setdefault((row["item"][1], row["name"]), []).append(row)
    return {
        "model": Path(args.model).name.partition(".")[0],
        "device": f"{args.device}{' (pages decoded)' if args.decoded else ''}",
        "setting": json.loads(
            json.dumps(vars(args) | {"model": Path(args.model).name}, default=lambda path: path.name)
        ),
        "rows": sorted(rows, key=lambda row: row["effective_bits"]),
        "canaries": [
            {
                "canary": canary,
                "name": name,
                "effective_bits": own[0]["bits"],
                **{key: _mean(row[key] for row in own) for key in ("kl", "same_top")},
                "texts": {row["item"][2]: row["kl"] for row in own},
            }
            for (canary, name), own in broken.items()
        ],
        "env": environment() | ({"device": _gpu()} if args.device == "cuda" else {}),
    }


def _over_texts(means: dict[str, Row]) -> Row:
    """Means over texts, which count alike."""
    return {
        **{key: _mean(row[key] for row in means.values()) for key in ("kl", "same_top")},
        "perplexity": math.exp(_mean(row["loss"] for row in means.values())),
        "positions": sum(row["positions"] for row in means.values()),
        "texts": means,
    }


def _over_positions(pieces: list[Row]) -> Row:
    """Median, 99th and 99.9th percentile of the KL over all positions, and its mean by position where texts are long:
    ranges that double from `start` on."""
    if not pieces:
        return {}
    rows = [unpack(row["each"]).reshape(-1, len(unpack(row["each"])) // _batch(row)) for row in pieces]
    every = np.concatenate([row.ravel() for row in rows])
    out: Row = {name: float(np.quantile(every, q)) for name, q in QUANTILES.items()}
    start, length = pieces[0]["start"], rows[0].shape[1]
    if start and length >= 3 * start and all(row.shape[1] == length for row in rows):
        edges = [0]
        while edges[-1] < length:
            edges.append(min(2 * (start + edges[-1]) - start, length))
        out["by_position"] = [
            {"start": start + a, "stop": start + b, "kl": float(_mean(float(row[:, a:b].mean()) for row in rows))}
            for a, b in zip(edges, edges[1:])
        ]
    return out


def _batch(row: Row) -> int:
    """Pieces of a text that an item measured at once."""
    return len(row["item"]) - 2


def _cells(measured: list[Row], name: str) -> dict[str, str]:
    """Outcomes of needles by "length depth answer"."""
    return {
        f"{row['item'][1]} {depth} {row['needle']}": outcome
        for row in measured
        if row["item"][0] == "needles" and row["name"] == name
        for depth, outcome in row["cells"].items()
    }


def _mean(values: Any) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _gpu() -> str:
    return torch.cuda.get_device_name()


def describe(row: Row) -> str:
    """A row for the terminal."""
    said = f"{row['name']:44s} {row['effective_bits']:7.4f} bits"
    if "kl" in row:
        said += f"  KL {row['kl']:.5f}  top {row['same_top']:.1%}  ppl {row['perplexity']:.3f}"
        if "kl_99" in row:
            said += f"  median {row['kl_median']:.1e} 99 % {row['kl_99']:.3f} 99.9 % {row['kl_999']:.3f}"
    if "needles" in row:
        needles = row["needles"]
        by = " ".join(f"{n['pass']}/{n['exact_pass']}" for n in needles["by_length"].values())
        said += f"  needles {needles['pass']}/{needles['of']} (by length, of the exact cache's: {by})"
    if "mean_first_divergence" in row:
        said += f"  first other token {row['mean_first_divergence']:.1f}"
    return said


def plot(result: dict[str, Any], path: Path) -> None:
    """KL against effective bits, logarithmic, ours and the field's."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    labels: dict[tuple[float, float], list[str]] = {}
    for row in result["rows"]:
        if row["kind"] not in ("preset", "calibrated", "peer") or "kl" not in row:
            continue
        own = row["kind"] != "peer"
        at = row["effective_bits"], row["kl"]
        axis.scatter(*at, color="#d9480f" if own else "#8a8f98", s=60 if own else 25, zorder=3 if own else 2)
        near = next((p for p in labels if p[0] == at[0] and abs(math.log(p[1] / at[1])) < 0.1), at)
        labels.setdefault(near, []).append(row["name"])
    for (bits, kl), names in labels.items():
        own, right = names[0].startswith(("preset", "calibrated")), bits > 7
        text = ", ".join(name.removeprefix("preset ") for name in names)
        offset, side = ((-6, 3), "right") if right else ((6, 3), "left")
        axis.annotate(text, (bits, kl), xytext=offset, textcoords="offset points", ha=side, fontsize=9 if own else 7)
    axis.set(
        yscale="log",
        xlabel="effective bits per element, scales and means included",
        ylabel="KL to the exact cache, nats",
        title=f"{result['model']}: fidelity against size",
    )
    axis.margins(x=0.12)
    axis.grid(True, which="both", alpha=0.3)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def save(result: dict[str, Any], json_file: Path | None, plot_file: Path | None) -> None:
    if json_file:
        write_json(json_file, result)
    if plot_file:
        plot(result, plot_file)


def read(name: str) -> Row:
    """A result, or of its texts only some: FILE[:TEXT,...]."""
    file, _, names = name.partition(":")
    result: Row = json.loads(Path(file).read_text())
    for row in result["rows"] if names else ():
        row["texts"] = {text: found for text, found in row["texts"].items() if text in names.split(",")}
    return result


def join(results: list[Row]) -> Row:
    """One result of several that measured other caches, or other things, of the same model on the same documents.

    Raises:
        ValueError: documents that the exact cache reads otherwise in one result than in another.
    """
    rows: dict[str, Row] = {}
    for row in (row for result in results for row in result["rows"]):
        known = rows.setdefault(row["name"], {"texts": {}})
        for text, found in row.get("texts", {}).items():
            if row["name"] == "exact" and abs(known["texts"].get(text, found)["loss"] - found["loss"]) > 1e-4:
                raise ValueError(f"[fidelity] expected results on the same documents; got two kinds of {text!r}")
        known |= {**row, "texts": known["texts"] | row.get("texts", {})}
    for row in rows.values():
        texts = row.pop("texts")
        row |= _over_texts(texts) if texts else {}
    return {
        **results[0],
        "rows": sorted(rows.values(), key=lambda row: row["effective_bits"]),
        "canaries": [row for result in results for row in result["canaries"]],
        "seconds": sum(result.get("seconds", 0.0) for result in results),
        "parts": [{"setting": result["setting"], "env": result["env"]} for result in results],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE[:TEXT,...]", help="results, or some texts of them")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    result = join(list(map(read, args.files)))
    for row in result["rows"]:
        print(describe(row))
    save(result, args.json, args.plot)


if __name__ == "__main__":
    main()
