"""Every architecture of mlx-lm: what a packed cache makes of it is what docs/mlx-families.md says, and the packed ones
compute what they should."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="MLX is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import mlx_families

from forgeattention.integrations import mlx as forge

PAGE = Path(__file__).parents[1] / "docs" / "mlx-families.md"
# Of each kind that differs in what reaches attention: plain, keys whose dtype is read, keys and values of different
# widths, shared keys, chunks and windows beside full layers, recurrent states, experts, fewer caches than layers.
COMPUTED = (
    *("phi", "stablelm", "deepseek_v2", "mimo_v2_flash", "gemma3n", "gemma4_text", "llama4_text", "nemotron_h"),
    *("jamba", "lfm2", "minimax", "afm7"),
)
FLIPS = 0.1
"""Largest error, in nats: a key on the edge between two codes, or an expert chosen by a hair, may fall either way."""


def rows() -> dict[str, list[str]]:
    """The table: outcome, and layers or reason, by architecture."""
    lines = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines[1:]}


def test_the_table_says_what_each_architecture_gets() -> None:
    if f"mlx-lm {version('mlx-lm')}," not in PAGE.read_text():
        pytest.skip(f"the table was made with another mlx-lm than {version('mlx-lm')}")
    wanted, found = rows(), {}
    for name in mlx_families.names():
        if name not in wanted or wanted[name][0] == "not run":
            continue
        made = mlx_families.build(name)
        try:
            told = forge.report(forge.make_prompt_cache(made, fitted=False))
            found[name] = ["packed", f"{told['packed']} of {told['of']}"]
        except ValueError as error:
            found[name] = mlx_families.refusal(error)
    assert found == {name: cells[:2] for name, cells in wanted.items() if cells[0] != "not run"}
    assert sum(kind == "packed" for kind, _ in found.values()) > 90


@pytest.mark.parametrize("name", COMPUTED)
def test_packed_layers_compute_what_stock_layers_of_decoded_values_do(name: str) -> None:
    found: Any = mlx_families.outcome(name)
    assert found.kind == "packed", found
    assert found.error < FLIPS
