"""What sparse attention leaves out against the bytes that a step reads.

    python benchmarks/plot_sparse.py ATTENTION.json FIDELITY.json OUT.png

Left: dropped softmax mass by context and distribution of keys (sparse_attention.py). Right: what that costs a model
(sparse_fidelity.py), with the needles found.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    attention, fidelity = (json.loads(Path(x).read_text()) for x in sys.argv[1:3])
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    colors = {n: f"C{i}" for i, n in enumerate(sorted({r["shape"]["context"] for r in attention[1:]}))}
    for record in attention[1:]:
        if record["distribution"] == "iid":
            continue
        context, real = record["shape"]["context"], record["distribution"] == "real"
        axes[0].plot(
            record["bytes_read"] / record["bytes_dense"], max(record["dropped_mass"], 1e-4),
            ("^" if record.get("fast") else "o"), color=colors[context], fillstyle="full" if real else "none",
        )  # fmt: skip
    for context, color in colors.items():
        axes[0].plot([], [], "s", color=color, label=f"{context:,} tokens")
    for marker, fill, label in (
        ("o", "full", "all keys scored"),
        ("^", "full", "fast"),
        ("s", "none", "clustered keys"),
    ):
        axes[0].plot([], [], marker, color="0.4", fillstyle=fill, label=label)
    axes[0].set(xlabel="bytes read, share of a dense step", ylabel="softmax mass dropped", yscale="log")
    axes[0].legend(fontsize=8, frameon=False)
    for i, row in enumerate(fidelity["rows"][1:]):
        axes[1].plot(row["share_of_bytes"], row["kl_rise"], "o", color="C0")
        label = f"{row['rule']}, {row['kept']} of {row['of']}"
        left = row["share_of_bytes"] > 0.7
        offset = -7 if left else 7, 11 if i % 2 else -3
        axes[1].annotate(label, (row["share_of_bytes"], row["kl_rise"]), xytext=offset,
                         textcoords="offset points", ha="right" if left else "left", fontsize=8)  # fmt: skip
    axes[1].axhline(0.01, color="0.7", linewidth=1)
    axes[1].set(xlabel="bytes read, share of a dense step", ylabel="KL above the dense packed cache", xlim=(0, 1.05))
    for axis in axes:
        axis.grid(True, alpha=0.3)
    figure.savefig(sys.argv[3], dpi=130)


if __name__ == "__main__":
    main()
