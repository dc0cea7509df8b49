"""The user's folders and the environment variables that the package reads."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from threading import Barrier

from forgeattention.backends.cuda import nvrtc
from forgeattention.util.folders import cache_folder

ROOT = Path(__file__).resolve().parents[1]


def test_one_variable_has_one_meaning(monkeypatch, tmp_path):
    monkeypatch.setenv("FORGEATTENTION_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder("models") == tmp_path / "models"
    assert cache_folder("cuda") == tmp_path / "cuda"


def test_compiled_kernels_are_kept_there(monkeypatch, tmp_path):
    monkeypatch.setenv("FORGEATTENTION_CACHE", str(tmp_path))
    monkeypatch.setattr(nvrtc, "compile_kernel", lambda *args: b"cubin")
    monkeypatch.setattr(nvrtc, "available", lambda: (True, "NVRTC 13.0"))
    nvrtc.cubin("encode", (), "sm_90a")
    assert [path.parent for path in tmp_path.rglob("*.cubin")] == [tmp_path / "cuda"]


def test_kernels_are_compiled_side_by_side_and_once(monkeypatch, tmp_path):
    monkeypatch.setenv("FORGEATTENTION_CACHE", str(tmp_path))
    monkeypatch.setattr(nvrtc, "source", lambda *args: "text")
    both, seen = Barrier(2), []

    def compile_kernel(stem, *args):
        seen.append(stem)
        both.wait(30)  # until the other one has begun too
        return stem.encode()

    monkeypatch.setattr(nvrtc, "compile_kernel", compile_kernel)
    monkeypatch.setattr(nvrtc.os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setattr(nvrtc, "_compilers", cache(nvrtc._compilers.__wrapped__))
    kernels = [("a kernel of this test", ()), ("another", (("FORGE_DIM", "64"),))]
    codes = [code.result() for code in nvrtc.start(kernels, "sm_90a")]
    again = [code.result() for code in nvrtc.start(kernels, "sm_90a")]
    assert codes == again == [b"a kernel of this test", b"another"]
    assert sorted(seen) == ["a kernel of this test", "another"]
    assert len(list((tmp_path / "cuda").iterdir())) == 2


def test_without_it_the_user_s_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("FORGEATTENTION_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("models") == tmp_path / "forgeattention" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("cuda") == tmp_path / ".cache" / "forgeattention" / "cuda"


def test_every_variable_is_spelled_one_way_and_documented():
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "src").rglob("*.cpp"), *(ROOT / "src").rglob("*.h")]
    read = set()
    for path in sources:
        read |= set(re.findall(r"""(?:environ(?:\.get)?[(\[]|getenv\()\s*["'](FORGE\w*)""", path.read_text()))
    assert read >= {"FORGEATTENTION_CACHE", "FORGEATTENTION_CPU_ISA", "FORGEATTENTION_API_KEY"}
    assert all(name.startswith("FORGEATTENTION_") for name in read)
    documented = set(
        re.findall(r"^\| `(FORGEATTENTION_\w+)`", (ROOT / "docs" / "commands.md").read_text(), re.MULTILINE)
    )
    assert documented == read
