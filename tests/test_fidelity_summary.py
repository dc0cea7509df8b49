"""The fidelity benchmark's sums: what items say of each cache, put together."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fidelity_summary

ARGS = argparse.Namespace(model="folder/model.gguf", device="cpu", decoded=False, json=Path("out.json"))


def row(name: str, item: list[Any], **found: Any) -> dict[str, Any]:
    return {"item": item, "name": name, "kind": "preset", "bits": {"exact": 16.0, "a": 3.0, "b": 2.0}[name], **found}


def text(name: str, kind: str, piece: int, kl: float, positions: int = 100) -> dict[str, Any]:
    return row(name, ["text", kind, piece], kl=kl, same_top=1 - kl, loss=math.log(4), positions=positions)


def test_texts_count_alike_and_pieces_by_their_positions() -> None:
    measured = [text("a", "x", 0, 0.1), text("a", "x", 1, 0.4, 200), text("a", "y", 0, 0.5), text("b", "x", 0, 0.2)]
    result = fidelity_summary.summary(ARGS, measured)
    b, a = result["rows"]
    assert (b["name"], a["name"]) == ("b", "a")
    assert a["texts"]["x"]["kl"] == pytest.approx(0.3)
    assert a["kl"] == pytest.approx(0.4)
    assert a["perplexity"] == pytest.approx(4)
    assert a["positions"] == 400
    assert result["model"] == "model"
    assert "KL 0.40000" in fidelity_summary.describe(a)


def test_needles_are_counted_by_length_and_against_the_exact_cache() -> None:
    def cells(name: str, length: int, *outcomes: str) -> dict[str, Any]:
        depths = {str(i): outcome for i, outcome in enumerate(outcomes)}
        return row(name, ["needles", length, 0], needle="N 1", cells=depths)

    measured = [
        cells("exact", 500, "PASS", "PASS", "FAIL"),
        cells("exact", 2500, "PASS", "PASS", "PASS"),
        cells("a", 500, "PASS", "PARTIAL_WORD", "PASS"),
        cells("a", 2500, "PASS", "PASS", "ECHO"),
    ]
    a, _ = fidelity_summary.summary(ARGS, measured)["rows"]
    assert {key: a["needles"][key] for key in ("of", "pass", "exact_pass", "kept")} == {
        "of": 6, "pass": 4, "exact_pass": 5, "kept": 3,
    }  # fmt: skip
    assert a["needles"]["by_length"] == {
        500: {"of": 3, "pass": 2, "exact_pass": 2},
        2500: {"of": 3, "pass": 2, "exact_pass": 3},
    }


def test_agreement_and_canaries() -> None:
    measured = [
        row("a", ["greedy", "x", 0, 1], first_divergence=[3, 64], of=64),
        row("a", ["greedy", "y", 0], first_divergence=[5], of=64),
        row("exact", ["canary", "c", "x"], kl=0.0, same_top=1.0),
        row("a", ["canary", "c", "x"], kl=0.2, same_top=0.9),
        row("a", ["canary", "c", "y"], kl=0.4, same_top=0.7),
    ]
    result = fidelity_summary.summary(ARGS, measured)
    a = next(found for found in result["rows"] if found["name"] == "a")
    assert (a["mean_first_divergence"], a["of"]) == (24, 64)
    (canary,) = result["canaries"]
    assert (canary["canary"], canary["name"]) == ("c", "a")
    assert canary["kl"] == pytest.approx(0.3)


def test_results_on_the_same_documents_are_joined(tmp_path: Path) -> None:
    measured = [text("a", "x", 0, 0.1), text("a", "y", 0, 0.3), text("exact", "x", 0, 0.0), text("exact", "y", 0, 0.0)]
    a = fidelity_summary.summary(ARGS, measured)
    b = fidelity_summary.summary(ARGS, [text("b", "x", 0, 0.2), text("a", "x", 0, 0.5), text("exact", "x", 0, 0.0)])
    c = fidelity_summary.summary(ARGS, [row("a", ["greedy", "x", 0], first_divergence=[7], of=9)])
    joined = {found["name"]: found for found in fidelity_summary.join([a, b, c])["rows"]}
    assert list(joined) == ["b", "a", "exact"]
    assert joined["a"]["kl"] == pytest.approx(0.4)
    assert joined["a"]["mean_first_divergence"] == 7
    assert joined["a"]["positions"] == 200
    other = fidelity_summary.summary(
        ARGS, [row("exact", ["text", "x", 0], kl=0.0, same_top=1.0, loss=1.0, positions=9)]
    )
    with pytest.raises(ValueError, match=r"^\[fidelity\] expected results on the same documents; got two kinds of 'x'"):
        fidelity_summary.join([a, other])
    (tmp_path / "a.json").write_text(json.dumps(a))
    only_y = fidelity_summary.join([fidelity_summary.read(f"{tmp_path}/a.json:y"), other])
    assert next(found for found in only_y["rows"] if found["name"] == "a")["kl"] == pytest.approx(0.3)


def test_what_there_is_no_time_for_is_left_out_and_measured_by_the_next_run(tmp_path: Path, monkeypatch: Any) -> None:
    import fidelity

    clock, asked = [0.0], []

    class Bench:
        def __init__(self, args: Any) -> None:
            pass

        def measure(self, item: Any) -> list[dict[str, Any]]:
            asked.append(item[1:])
            clock[0] += 61
            return [text("a", item[1], item[2], 0.1) | {"item": list(item)}]

    monkeypatch.setattr(fidelity, "Bench", Bench)
    monkeypatch.setattr(fidelity.time, "time", lambda: clock[0])
    given = {"set": "field", "kinds": ["text"], "texts": ["x", "y"], "windows": 2, "batch": 1, "workers": 1}
    args = argparse.Namespace(**vars(ARGS), **given, journal=tmp_path / "journal", minutes=2.5)
    result = fidelity.run(args)
    assert asked == [("x", 0), ("y", 0), ("x", 1)]  # every text once before any comes again
    assert result["rows"][0]["positions"] == 300
    assert fidelity.run(args)["rows"][0]["positions"] == 400
    assert len(asked) == 4
