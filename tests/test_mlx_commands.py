"""The command line with mlx-lm alone: answers, prompt caches from the shell, plans, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from test_mlx_server import folder  # noqa: E402

from forgeattention.tools import chat, cli  # noqa: E402

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from forgeattention.tools.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> str:
    return str(folder(tmp_path_factory.mktemp("models") / "tiny", "llama"))


def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = WITHOUT_TORCH.replace("main()", f"main({list(arguments)!r})")
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_one_answer_and_a_plan_need_no_torch(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "answer.json"
    done = without_torch(
        "generate", "--engine", "mlx", "--model", tiny, "--max-new-tokens", "5", "--json", str(out), "Hello"
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(out.read_text())
    assert answer["text"] == done.stdout.removesuffix("\n")
    assert (answer["new_tokens"], answer["prompt_tokens"], answer["engine"]) == (5, 6, "mlx")
    done = without_torch("plan", "--model", tiny, "--memory", "apple 16GB")
    assert done.returncode == 0, done.stderr
    assert "Apple 16 GB (10.6 GB to fill)" in done.stdout
    assert "4 full" in done.stdout


def test_a_conversation_goes_on_in_its_file(tiny: str, tmp_path: Path, capsys: Any) -> None:
    file, first = str(tmp_path / "talk.safetensors"), ["generate", "--engine", "mlx", "--model", tiny]
    first += ["--max-new-tokens", "4", "--preset", "fidelity"]
    long = "A long text. " * 30
    sizes = []
    for prompt in (long, "and", "so"):
        out = tmp_path / "one.json"
        assert cli.main([*first, "--prompt-cache", file, "--json", str(out), prompt]) == 0
        sizes.append(json.loads(out.read_text()))
    assert sizes[1]["prompt_tokens"] < 10
    assert sizes[2]["cache_bytes"] >= sizes[1]["cache_bytes"] > 0
    capsys.readouterr()
    assert cli.main([*first, "--cache", "exact", "--prompt-cache", file, "x"]) == 2
    assert "expected --prompt-cache with --engine mlx and the packed cache" in capsys.readouterr().err
    assert cli.main([*first, "--prompt-cache", str(tmp_path / "none" / "f"), "x"]) == 2
    assert "expected --prompt-cache in a folder that exists" in capsys.readouterr().err


def test_chat_runs_mlx_lms_with_packed_caches(tiny: str, monkeypatch: Any, capsys: Any) -> None:
    from mlx_lm import chat as theirs

    from forgeattention.integrations.mlx import PackedKVCache

    made: list[Any] = []
    monkeypatch.setattr(theirs, "main", lambda: made.extend(theirs.make_prompt_cache(theirs.load(sys.argv[2])[0])))
    assert cli.main(["chat", "--model", tiny, "--max-tokens", "5"]) == 0
    assert all(isinstance(layer, PackedKVCache) for layer in made)
    assert cli.main(["chat", "--model", tiny, "--max-kv-size", "5"]) == 2
    assert "expected no --max-kv-size with a packed cache" in capsys.readouterr().err
    assert sys.argv[0] != "mlx_lm.chat"
    assert "--model" in chat.REPLACED
