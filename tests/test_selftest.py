"""`forgeattn selftest` on this machine's processor: its steps, its report, and what it says of faults."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forgeattention import ops
from forgeattention.tools import cli, selftest
from forgeattention.tools.selftest import arrays, oracle, page
from forgeattention.tools.selftest.__main__ import found_by

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")


def args(tmp_path: Path, **changes: Any) -> Namespace:
    given = {"device": "cpu", "model": "smollm2", "quick": True, "output": tmp_path / "out", "steps": ["ops"]}
    return Namespace(**{**given, **changes})


def test_the_ops_are_right_and_the_report_is_written(tmp_path: Path, capsys: Any) -> None:
    options = ["--device", "cpu", "--quick", "--steps", "ops", "--output", str(tmp_path / "out")]
    assert cli.main(["selftest", *options]) == 0
    report = json.loads((tmp_path / "out" / "selftest.json").read_text())
    assert [found["status"] for found in report["steps"].values()] == ["passed"]
    rows = report["steps"]["ops"]["rows"]
    assert {row["op"].partition(",")[0] for row in rows} == {
        *("encode", "decode_pages", "decode_attention", "prefill_attention", "qk_scores", "value_sum"),
        *("sparse_threshold", "sparse_attention"),
    }
    assert all(row["first_ms"] > 0 for row in rows)
    assert report["machine"]["system"]
    text = (tmp_path / "out" / "selftest.html").read_text()
    assert "ops: <span" in text
    out = capsys.readouterr().out
    assert "ops: every op against the float64 oracle" in out
    assert "attach both to a report" in out


def test_a_wrong_kernel_fails_with_its_error(monkeypatch: Any) -> None:
    right = ops.qk_scores
    monkeypatch.setattr(
        ops, "qk_scores", lambda *a, backend="auto": right(*a, backend=backend) * (1 + (backend == "auto"))
    )
    found = oracle.run({"device": "cpu", "quick": True})
    assert found["status"] == "failed"
    assert found["reason"].startswith("1 of 9 calls: qk_scores is off by 1.0e+00")
    assert '<tr class="failed">' in page.page({**REPORT, "steps": {"ops": found}})


def test_a_kernel_that_does_not_compile_is_a_row_with_its_message(monkeypatch: Any) -> None:
    right = ops.value_sum

    def value_sum(*given: Any, backend: str = "auto") -> Any:
        if backend == "auto":
            raise RuntimeError("[metal::Device] Unable to build metal library from source")
        return right(*given, backend=backend)

    monkeypatch.setattr(ops, "value_sum", value_sum)
    found = oracle.run({"device": "cpu", "quick": True})
    assert found["status"] == "failed"
    assert sum("fault" in row for row in found["rows"]) == 1
    assert "<pre>RuntimeError: [metal::Device] Unable to build" in page.page({**REPORT, "steps": {"ops": found}})


REPORT = {"machine": {"system": "x"}, "env": {"versions": {}}, "device": "cpu", "seconds": 1.0}


def test_a_process_that_dies_or_hangs_is_a_failed_step(tmp_path: Path, monkeypatch: Any) -> None:
    broken = args(tmp_path, model="\0")
    monkeypatch.setattr(selftest.sys, "executable", "false")
    assert selftest.step("ops", broken, 60)["reason"].startswith("the process ended with 1")
    monkeypatch.setattr(selftest.sys, "executable", "/bin/sleep")
    monkeypatch.setattr(selftest.json, "dumps", lambda asked: "60")
    slow = selftest.step("ops", broken, 1.0)
    assert slow["status"] == "failed"


def test_devices() -> None:
    assert arrays.device("cpu").framework == "mlx"
    with pytest.raises(arrays.Skipped, match="device metal is not available here"):
        arrays.device("metal")
    numpy = arrays.Device("numpy", "NumPy", False)
    assert numpy.host(numpy.put(np.ones(3), "float16")).dtype == np.float32
    assert found_by({"step": "decode", "device": "metal", "quick": True})["status"] == "skipped"


@pytest.mark.parametrize("torch", [True, False])
def test_without_smollm2_its_steps_are_left_out_with_the_command_that_gets_it(monkeypatch: Any, torch: bool) -> None:
    find, asked = arrays.importlib.util.find_spec, []

    def load(name: str, *, dtype: str) -> Any:
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr("forgeattention.models.load_mlx", load)
    monkeypatch.setattr(
        arrays.importlib.util, "find_spec", lambda name: None if name == "torch" and not torch else find(name)
    )
    given = {"device": "mlx", "quick": True, "model": "smollm2"}
    for step in ("needles", "generation"):
        found = found_by({"step": step, **given})
        assert found["status"] == "skipped"
        assert "SmolLM2 is not on this machine: run `" in found["reason"]
        assert ("forgeattn models fetch smollm2" in found["reason"]) == torch
    assert asked == ["smollm2" if torch else "HuggingFaceTB/SmolLM2-135M-Instruct"] * 2
    assert found_by({"step": "needles", **given, "model": "mine"})["status"] == "failed"


def test_a_model_without_sense_passes_as_its_exact_cache_does(tmp_path: Path) -> None:
    from test_mlx_server import folder

    asked = {"device": "cpu", "quick": True, "model": str(folder(tmp_path / "tiny", "llama"))}
    found = found_by({"step": "needles", **asked})
    assert found["status"] == "passed", found
    assert found["reason"] == "exact 0 of 2, balanced 0 of 2, small 0 of 2"
    found = found_by({"step": "generation", **asked})
    assert [row["cache"] for row in found["rows"]] == ["exact", "balanced", "small", "mlx-lm 8 bit", "mlx-lm 4 bit"]
    sizes = {row["cache"]: row["cache_mb"] for row in found["rows"]}
    assert sizes["small"] < sizes["balanced"] < sizes["exact"]


def test_the_decode_table(monkeypatch: Any) -> None:
    from forgeattention.tools.bench import metal

    monkeypatch.setattr(metal, "ROUNDS", 2)
    monkeypatch.setattr(metal, "ROUND_SECONDS", 1e-3)
    monkeypatch.setattr(metal, "COPY_BYTES", 1 << 20)
    found = found_by({"step": "decode", "device": "cpu", "quick": True})
    assert found["status"] == "passed", found
    (row,) = found["rows"]
    assert row["bytes"]["ours"] < row["bytes"]["mlx-lm 4 bit"] < row["bytes"]["mlx float16"]
    text = page.page({**REPORT, "steps": {"decode": found}})
    assert "<th>mlx-lm 8 bit</th>" in text
