"""Reports are whole files of honest JSON."""

import json
import platform
import re
from pathlib import Path

import pytest

from forgeattention.tools import cli
from forgeattention.tools.evaluation import texts
from forgeattention.util.environment import environment
from forgeattention.util.files import write_json
from forgeattention.util.progress import progress


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "r.json"
    write_json(file, {"a": 1.5})
    assert json.loads(file.read_text()) == {"a": 1.5}
    for bad in ({"a": float("nan")}, {"a": float("inf")}):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(file, bad)
    assert json.loads(file.read_text()) == {"a": 1.5}
    assert list(tmp_path.iterdir()) == [file]


def test_environment_says_what_ran():
    env = environment()
    assert env["versions"]["python"] == platform.python_version()
    assert {"numpy", "torch", "transformers"} <= set(env["versions"])
    assert env["cores"] >= 1
    assert env["processor"]
    json.dumps(env, allow_nan=False)


def test_the_commit_is_this_repositorys_or_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert environment()["commit"] is None


def test_progress_is_silent_without_a_terminal(capsys):
    with progress("Working", 2) as advance:
        advance()
        advance()
    assert capsys.readouterr() == ("", "")


def test_texts():
    assert "Apache License" in texts.read("licences")
    assert "GNU GENERAL PUBLIC LICENSE" in texts.read("licences")
    assert texts.read("genesis").startswith("In the beginning God created the heaven and the earth.")


def test_own_texts_are_read_from_files(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("Grüße.", encoding="utf-8")
    assert texts.read(str(file)) == "Grüße."
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"^\[texts\] expected UTF-8 text; got"):
        texts.read(str(file))
    for name in ("x", str(tmp_path), ""):
        with pytest.raises(ValueError, match=r"^\[texts\] expected a name in .* or a text file; got"):
            texts.read(name)


def test_generated_texts_are_long_enough_and_the_same_for_a_seed():
    for name in ("json", "table", "mixed"):
        text = texts.enough(name, 30000, 1)
        assert len(text) >= 30000
        assert text == texts.enough(name, 30000, 1)
        assert texts.enough(name, 40000, 1).startswith(text)
    for line in texts.enough("json", 20000, 2).splitlines():
        assert json.loads(line)["count"] > 0
    assert len({line.count("|") for line in texts.enough("table", 20000, 2).splitlines()}) == 1
    assert not re.search(r"(?<!\w)(\d{4}|\d{7})(?!\w)", texts.enough("json", 10**5) + texts.enough("table", 10**5))
    assert "def " in texts.read("code")


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def test_a_page_for_each_model_from_results_alone(tmp_path, capsys):
    qwen, other = sorted(RESULTS.glob("*-qwen2.5-coder-1.5b-*.json")), next(RESULTS.glob("encode-*.json"))
    gemma = sorted(RESULTS.glob("fidelity-gemma-3-270m-cpu-*.json"))
    files = [str(file) for file in (*qwen, *gemma, other)]
    assert cli.main(["report", "--results", *files, "--output", str(tmp_path / "pages")]) == 0
    out = capsys.readouterr().out
    assert f"left out, since they hold no results of a model's cache: {other.name}" in out
    assert {file.name for file in (tmp_path / "pages").iterdir()} == {"qwen2.5-coder-1.5b.html", "gemma-3-270m.html"}
    text = (tmp_path / "pages" / "qwen2.5-coder-1.5b.html").read_text()
    fidelity = json.loads(
        next(file for file in qwen if re.match(r"fidelity-qwen2.5-coder-1.5b-h", file.name)).read_text()
    )
    ours = next(row for row in fidelity["rows"] if row["name"] == "preset balanced")
    assert f"bends predictions by {ours['kl']:.4f} nats" in text
    assert fidelity["sha256"] in text
    for title in ("Fidelity", "HumanEval", "RULER", "Needles"):
        assert f"<h2>{title}" in text
    for row in fidelity["rows"]:
        assert row["name"] in text
    humaneval = json.loads(next(file for file in qwen if file.name.startswith("humaneval")).read_text())
    assert all(f"{row['passed']} of {row['of']}" in text for row in humaneval["rows"])


def test_results_are_not_measured_and_must_be_there(tmp_path, capsys):
    file = next(RESULTS.glob("fidelity-gemma-3-270m-cpu-*.json"))
    assert cli.main(["report", "--results", str(file), "--parts", "kl", "--output", str(tmp_path)]) == 2
    assert "expected --results without options that say what to measure; got --parts" in capsys.readouterr().err
    for wrong in (tmp_path / "none.json", next(RESULTS.glob("encode-*.json"))):
        assert cli.main(["report", "--results", str(wrong), "--output", str(tmp_path / "pages")]) == 2
        assert "[report] expected" in capsys.readouterr().err
    assert not (tmp_path / "pages").exists()
