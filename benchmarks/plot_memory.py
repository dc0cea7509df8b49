"""docs/images/memory-300k.png: bytes on the GPU while a packed cache grows, from a model benchmark's JSON.

python benchmarks/plot_memory.py benchmarks/results/model-h100-DATE.json docs/images/memory-300k.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    curve = next(r for r in json.loads(source.read_text()) if r["op"] == "memory_curve")
    seconds = [p["s"] for p in curve["points"]]
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    weights = curve["weights_bytes"] / 1e9
    axes.plot(seconds, [p["peak"] / 1e9 for p in curve["points"]], label="peak within the chunk, packed")
    axes.plot(seconds, [p["allocated"] / 1e9 for p in curve["points"]], label="allocated after it, packed")
    exact = [weights + p["exact_cache_would_be"] / 1e9 for p in curve["points"]]
    axes.plot(seconds, exact, "--", label="weights and a 16-bit cache (computed)")
    axes.axhline(weights, color="0.7", linewidth=1)
    begun = next((p["s"] for p in curve["points"] if p["phase"] == "decode"), None)
    if begun is not None:
        axes.axvline(begun, color="0.7", linewidth=1)
        axes.text(begun, 1, " decode", color="0.4")
    tokens = curve["points"][-1]["tokens"]
    axes.set(xlabel="seconds", ylabel="GB", ylim=(0, None), title=f"{curve['model']}, 0 to {tokens:,} tokens")
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
