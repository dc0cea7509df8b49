"""The command line dispatches, writes JSON and says errors in one line."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from forgeattention.codec.presets import PRESETS
from forgeattention.tools import cli


def leaves(parser, path=()):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from leaves(child, (*path, name))
            return
    yield " ".join(path), parser


LEAVES = dict(leaves(cli.build_parser()))


def run(capsys, *argv):
    code = cli.main(argv)
    return code, *capsys.readouterr()


@pytest.mark.parametrize("command", LEAVES)
def test_every_command_has_a_function_and_json(command):
    module, _, function = LEAVES[command].get_default("target").partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert "--json" in LEAVES[command].format_help()


@pytest.mark.parametrize(
    "argv",
    [
        ["models", "fetch", "gpt2"],
        ["eval", "kl", "--model", "nobody"],
        ["eval", "niah", "--model", "/no/such.gguf"],
        ["doctor", "--json", "/no/such/folder/x.json"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, argv):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("forgeattn: [")
    assert err.count("\n") == 1
    assert "expected" in err


@pytest.mark.parametrize("argv", [[], ["models"], ["eval", "kl", "--k-bits", "5"], ["doctor", "--nope"]])
def test_a_wrong_command_line_is_exit_code_2(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("[op] expected a;\n  got b"), 2, "forgeattn: [op] expected a; got b\n"),
        (RuntimeError("pip failed"), 1, "forgeattn: pip failed\n"),
        (OSError(28, "No space left"), 1, "forgeattn: [Errno 28] No space left\n"),
        (ModuleNotFoundError("No module named 'rich'", name="rich"), 1,
         "forgeattn: No module named 'rich': install it with pip install 'forgeattention[demo]'\n"),
        (KeyboardInterrupt(), 130, "forgeattn: interrupted\n"),
    ],
)  # fmt: skip
def test_errors_are_one_line(capsys, monkeypatch, tmp_path, error, code, line):
    def fail(args):
        raise error

    monkeypatch.setattr(cli, "doctor", fail)
    file = tmp_path / "x.json"
    assert run(capsys, "doctor", "--json", str(file)) == (code, "", line)
    assert list(tmp_path.iterdir()) == []


def test_a_defect_of_our_own_is_not_taken_for_a_missing_package(monkeypatch):
    def fail(args):
        raise ModuleNotFoundError("No module named 'forgeattention.x'", name="forgeattention.x")

    monkeypatch.setattr(cli, "doctor", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["doctor"])


def test_fetch_writes_json(capsys, tmp_path):
    file = tmp_path / "f.json"
    code, out, _ = run(capsys, "models", "fetch", "smollm2", "--json", str(file))
    written = json.loads(file.read_text())
    assert code == 0
    assert out == f"smollm2: {written['path']}\n"
    assert written["name"] == "smollm2"
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_serve_hands_over_to_each_engine(monkeypatch):
    from forgeattention.serving.options import ServerOptions
    from forgeattention.tools import serve

    calls = []
    fake = argparse.Namespace(serve=lambda *args, **options: calls.append((*args, options)))
    monkeypatch.setattr(serve.importlib, "import_module", lambda name: fake)
    monkeypatch.setattr(cli, "_target", lambda name: serve.run)
    at = ["--model", "m", "--preset", "small", "--port", "7"]
    assert cli.main(["serve", "hf", *at, "--cache-memory", "2GiB", "--drain", "5"]) == 0
    assert cli.main(["serve", "mlx", *at, "--max-tokens", "5"]) == 0
    assert cli.main(["serve", "vllm", *at, "-tp", "2", "--enforce-eager"]) == 0
    where = {"host": "127.0.0.1", "port": 7}
    assert calls == [
        ("m", PRESETS["small"], {**where, "options": ServerOptions(cache_memory="2GiB", drain=5)}),
        ("m", PRESETS["small"], {**where, "arguments": ["--max-tokens", "5"]}),
        ("m", PRESETS["small"], {**where, "arguments": ["-tp", "2", "--enforce-eager"]}),
    ]


@pytest.mark.parametrize(
    ("engine", "shown"),
    [("hf", "--cache-memory SIZE"), ("mlx", "mlx_lm.server --help"), ("vllm", "vllm serve --help")],
)
def test_help_of_serve_shows_the_engine_s_options(capsys, engine, shown):
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", engine, "--help"])
    assert stop.value.code == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["serve"], "the following arguments are required: ENGINE"),
        (["serve", "tgi"], "invalid choice: 'tgi'"),
        (["serve", "hf", "--max-tokens", "5"], "unrecognized arguments: --max-tokens 5"),
        (["serve", "hf", "--drain", "0"], "expected a number of 1 or more; got 0"),
        (["eval", "kl", "--cache", "packed"], "unrecognized arguments: --cache packed"),
    ],
)
def test_options_that_an_engine_or_command_does_not_have(capsys, argv, said):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_preset_names_are_written_once():
    for command, parser in LEAVES.items():
        for action in parser._actions:
            if "--preset" in action.option_strings:
                assert tuple(action.choices) == tuple(PRESETS), command
    source = Path(cli.__file__).read_text()
    assert not any(f'"{name}"' in source for name in PRESETS)


def test_doctor_reports_every_backend_and_why(capsys, tmp_path):
    file = tmp_path / "d.json"
    code, out, _ = run(capsys, "doctor", "--json", str(file))
    written = json.loads(file.read_text())
    assert code == 0
    assert {row["backend"] for row in written["backends"]} >= {"cpu", "cuda", "metal"}
    for row in written["backends"]:
        assert row["reason"]
        assert row["backend"] in out
        assert row["reason"] in out
    assert written["env"]["versions"]["torch"] in out
    assert "CPU kernels run on" in out


def test_help_needs_no_framework():
    program = "import sys, forgeattention.tools.cli as c; c.build_parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == "forgeattn 0.1.0\n"
