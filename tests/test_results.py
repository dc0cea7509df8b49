"""docs/results.md says what the JSON files say."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import make_results
import plot_tasks
import result_speed
import result_tables
import result_tasks

ROOT = make_results.ROOT


def test_the_page_is_up_to_date() -> None:
    assert make_results.PAGE.read_text() == make_results.page(), "run python benchmarks/make_results.py"


def test_files_that_are_named_exist() -> None:
    for name in re.findall(r"benchmarks/results/[\w.-]+?\.json", make_results.page()):
        assert (ROOT / name).is_file(), name


def test_a_line_becomes_the_newest_files_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_results, "RESULTS", tmp_path)
    monkeypatch.setattr(make_results, "ROOT", tmp_path)
    for name, us in (("x-b-2026-01-02", 1.5), ("x-a-2026-01-10", 2.5), ("x-c-2026-01-09", 3.5)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"us": us, "env": {"device": "D", "commit": "abc"}}))
    monkeypatch.setitem(result_tables.RENDERERS, "one", lambda content: f"{content['us']} us")
    want = "Before.\n\n2.5 us\n\n[`x-a-2026-01-10.json`](../x-a-2026-01-10.json): D, commit abc.\n\nAfter."
    assert make_results.fill("Before.\n\n{{ one x-*.json }}\n\nAfter.") == want
    with pytest.raises(ValueError, match=r"^\[results\] expected a kind in"):
        make_results.fill("{{ two x-*.json }}")
    with pytest.raises(ValueError, match=r"^\[results\] expected a file y-\*\.json in"):
        make_results.fill("{{ one y-*.json }}")


def test_the_fastest_peer_of_a_shape_is_the_one_compared_with() -> None:
    shape = {"batch": 1, "q_heads": 8, "kv_heads": 2, "head_dim": 64, "context": 4096}
    common = {"op": "decode_attention", "shape": shape, "share_of_copy": 0.5}
    records = [
        {"env": {}},
        {**common, "k_code": "scalar", "v_code": "scalar", "us": 10.0, "peers_us": {"a": 30.0, "b": 20.0}},
        {**common, "k_code": "trellis8", "v_code": "scalar", "us": 16.0, "peers_us": {"a": 32.0, "b": 24.0}},
    ]
    last = result_speed.decode(records).splitlines()[-1]
    assert last == "| 1 x 4K, 8/2, 64 | b | 20.0 | 10.0, 2.00x, 50% | 16.0, 1.25x, 50% |"


def test_tables_of_tasks() -> None:
    rows = [
        {"cache": "preset balanced", "bits": 3.125, "length": 0, "passed": 99, "of": 164, "failed": ["b", "c"]},
        {"cache": "exact", "bits": 16.0, "length": 0, "passed": 100, "of": 164, "failed": ["a", "b"]},
        {"cache": "exact", "bits": 16.0, "length": 16384, "passed": 90, "of": 164, "failed": ["a"]},
    ]
    lines = result_tasks.humaneval({"rows": rows}).splitlines()
    assert lines[0] == "| cache | bits | passed | against exact | passed behind 16,384 tokens | against exact |"
    assert lines[2] == "| exact | 16.000 | 100 of 164 |  | 90 of 164 |  |"
    assert lines[3] == "| **`balanced`** | 3.125 | 99 of 164 | 1 lost, 1 won |  |  |"
    scores = [
        {"cache": cache, "bits": bits, "task": task, "length": length, "of": 2, "score": score}
        for cache, bits, add in (("exact", 16.0, 0.0), ("a", 3.0, -10.0))
        for task, base in (("vt", 50.0), ("cwe", 80.0))
        for length, score in ((4096, base + add), (16384, base + add - 20))
    ]
    assert result_tasks.by_length({"rows": scores}).splitlines()[2:] == [
        "| exact | 16.000 | 65.0 | 45.0 |",
        "| a | 3.000 | 55.0 | 35.0 |",
    ]
    # A length that one cache was not asked at counts for none.
    cut = [row for row in scores if (row["cache"], row["task"], row["length"]) != ("a", "vt", 16384)]
    assert result_tasks.by_task({"rows": cut}).splitlines()[2] == "| vt | 4,096 | 50.0 | 40.0 |"
    found = [{"cache": "a", "bits": 3.0, "task": "multi", "length": 8000, "of": 5, "passed": n} for n in (4, 5)]
    assert result_tasks.by_length({"rows": found}).splitlines()[2] == "| a | 3.000 | 9 of 10 |"
    assert plot_tasks.means(found) == {"a": {8000: 90.0}}


def test_a_table_by_position() -> None:
    parts = [{"start": 1000, "stop": 2000, "kl": 0.001}, {"start": 2000, "stop": 4000, "kl": 0.002}]
    rows = [{"name": "preset small", "effective_bits": 2.125, "by_position": parts}]
    assert result_tasks.by_position({"rows": rows}).splitlines() == [
        "| cache | bits | 1,000 to 2,000 | 2,000 to 4,000 |",
        "|---|---|---|---|",
        "| **`small`** | 2.125 | 0.0010 | 0.0020 |",
    ]
