"""Reports are whole files of honest JSON."""

import json
import platform
import re

import pytest

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
