"""The MLX benchmark on a small shape, and the page made of records. No speed is asserted."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from tolerances import MLX_CPU  # noqa: E402

from forgeattention.codec import CodecSpec  # noqa: E402
from forgeattention.tools.bench import decode  # noqa: E402
from forgeattention.tools.bench import metal as bench_mlx  # noqa: E402
from forgeattention.tools.bench import report as bench_report  # noqa: E402

SPEC = CodecSpec(k_code="scalar", refine=False)


@pytest.fixture(scope="module")
def record() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_mlx, "ROUND_SECONDS", 1e-4)
        patch.setattr(bench_mlx, "ROUNDS", 2)
        return bench_mlx.measure(SPEC, 2, 4, 2, 64, 130, 10.0)


def test_a_record_says_what_was_measured(record: Any) -> None:
    fp16 = 2 * 2 * 2 * 130 * 64 * 2
    assert record["rel_error"] < 4 * MLX_CPU["float16"]
    assert record["packed_bytes"] == 2 * 3 * 2 * SPEC.page_format(64).record_bytes
    assert record["peers_bytes"] == {
        "mlx float16": fp16,
        "mlx-lm 8 bit": fp16 * 8 // 16 + fp16 // 2 // 64 * 4,
        "mlx-lm 4 bit": fp16 * 4 // 16 + fp16 // 2 // 64 * 4,
    }
    assert record["ratio"] == pytest.approx(min(record["peers_us"].values()) / record["us"])
    assert record["shape"]["context"] == 130
    json.dumps(record, allow_nan=False)


def test_the_page_has_every_figure(record: Any, tmp_path: Any) -> None:
    env = {"processor": "M<4>", "machine": "macOS", "versions": {"mlx": "0.32.4"}, "spec": SPEC.to_json()}
    path = tmp_path / "records.json"
    path.write_text(json.dumps([{"op": "env", "env": env}, record]))
    bench_report.run(argparse.Namespace(records=path, output=tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    assert "Decode attention on M&lt;4&gt;" in text
    for figure in (record["us"], *record["peers_us"].values()):
        assert f"<td>{figure:.0f}</td>" in text
    for name, size in record["peers_bytes"].items():
        assert f"<th>{name} MB</th>" in text
        assert f"<td>{size / 1e6:.1f}</td>" in text
    assert f"<td>{record['tokens_per_s']:.0f}</td>" in text
    with pytest.raises(ValueError, match=r"\[bench\] expected the records"):
        bench_report.page([{"op": "env", "env": env}])


def test_metal_is_refused_without_a_metal_device() -> None:
    if mx.metal.is_available():
        pytest.skip("this machine has a Metal device")
    with pytest.raises(ValueError, match=r"\[bench\] expected a Mac with a Metal device"):
        decode.run(argparse.Namespace(device="metal"))


def test_the_table(record: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device: {"device_name": "Apple M4", "memory_size": 1 << 34})
    monkeypatch.setattr(bench_mlx, "copy_bandwidth", lambda: 100.0)
    monkeypatch.setattr(bench_mlx, "measure", lambda *shape: record)
    options = {"device": "metal", "contexts": [130], "batches": [2], "q_heads": 4, "kv_heads": 2, "head_dim": 64}
    records = decode.run(argparse.Namespace(**options, preset=None, k_bits=None, v_bits=None, tune=False))
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "Apple M4: copying memory at 100 GB/s"
    assert out[2].split()[:3] == ["2", "130", f"{record['us']:.0f}"]
    assert len(out[2].split()) == 11
    assert [r["op"] for r in records] == ["env", "decode_attention"]


def test_the_fastest_plan_is_kept(monkeypatch: Any, tmp_path: Any, capsys: Any) -> None:
    monkeypatch.setenv("FORGEATTENTION_CACHE", str(tmp_path))

    def turns(calls: Any, x: Any) -> Any:
        for call in calls.values():
            assert call(x).shape == (2, 8, 1, 64)
        return {name: [1e-3 if name == "2" else 2e-3] for name in calls}

    monkeypatch.setattr(bench_mlx, "_take_turns", turns)
    options = {"contexts": [130, 70], "batches": [2], "q_heads": 8, "kv_heads": 2, "head_dim": 64}
    found = bench_mlx.tune(argparse.Namespace(**options), SPEC, "Apple M4")
    assert found["us"] == {"1": 4000.0, "2": 2000.0, "4": 4000.0}
    assert json.loads((tmp_path / "metal" / "plans.json").read_text()) == {"Apple M4": {"64": 2}}
    assert "2 is kept in" in capsys.readouterr().out
