"""Backends' tables: what they name exists, and every backend can hold a cache."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import forgeattention
from forgeattention.ops import registry

BACKENDS = Path(forgeattention.__file__).parent / "backends"
TABLES = [(name, mlx) for name in registry.BACKENDS for mlx in (False, True) if registry.table(name, mlx)]
CACHE = {"encode", "decode_pages", "compact", "decode_attention", "prefill_attention", "merge", "qk_scores"}
"""What a cache that may drop tokens calls."""


@pytest.mark.parametrize(("backend", "mlx"), TABLES)
def test_launchers_exist(backend: str, mlx: bool) -> None:
    table = registry.table(backend, mlx)
    assert set(table) <= set(registry.OPS)
    for op, module in table.items():
        tree = ast.parse(BACKENDS.joinpath(*module.split(".")).with_suffix(".py").read_text())
        assert op in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, module


@pytest.mark.parametrize(("backend", "mlx"), TABLES)
def test_every_backend_can_hold_a_cache(backend: str, mlx: bool) -> None:
    """A cache compacts its pages in the middle of an append, where an op must not be missing."""
    assert set(registry.table(backend, mlx)) >= CACHE


def test_the_report_says_what_a_backend_lacks() -> None:
    rows = {row["backend"]: row for row in registry.report()}
    assert rows["cpu"]["lacks"] == rows["reference"]["lacks"] == rows["cuda"]["lacks"] == []
    assert rows["metal"]["lacks"] == ["append_step", "append_tokens", "decode_into", "encode_rows"]
    if "cuda, MLX" in rows:
        assert "sparse_scores" in rows["cuda, MLX"]["lacks"]


def test_a_paged_engines_steps_are_found_by_the_backends_name() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    steps = registry.paged_steps("cuda")
    assert all(getattr(steps, name).__doc__ for name in steps.__all__)
    for backend in ("cpu", "metal", "reference"):
        with pytest.raises(ValueError, match=rf"\[paged_steps\] expected a backend that .*; got '{backend}'"):
            registry.paged_steps(backend)
