"""Scores by length of every cache, from long_tasks.py's results: python benchmarks/plot_tasks.py FILE.json IMAGE.png"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def means(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Mean score, or percentage of needles found, by cache and length."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        value = row["score"] if "score" in row else 100 * row["passed"] / row["of"]
        found.setdefault(row["cache"], {}).setdefault(row["length"], []).append(value)
    return {cache: {n: sum(x) / len(x) for n, x in sorted(own.items())} for cache, own in found.items()}


def main() -> None:
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("image", type=Path)
    args = parser.parse_args()
    content = json.loads(args.file.read_text())
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for cache, points in means(content["rows"]).items():
        own = cache == "exact" or cache.startswith("preset")
        label = cache.removeprefix("preset ")
        axis.plot(list(points), list(points.values()), "o-" if own else "o:", label=label, linewidth=2 if own else 1)
    axis.set(xscale="log", xlabel="tokens", ylabel="mean score", title=content["model"])
    lengths = sorted({row["length"] for row in content["rows"]})
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths], minor=False)
    axis.minorticks_off()
    axis.grid(True, alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(args.image, dpi=150)


if __name__ == "__main__":
    main()
