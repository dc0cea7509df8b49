"""The names that a user imports, and what importing costs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import forgeattention

HEAVY = ("numpy", "torch", "transformers", "mlx", "vllm", "safetensors")


def loaded_after(statement: str) -> set[str]:
    """Top-level modules in a fresh process after one statement."""
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_after("import forgeattention").isdisjoint(HEAVY)


def test_settings_need_no_framework():
    statement = "from forgeattention import PRESETS, CodecSpec, Eviction, SparseSpec"
    assert loaded_after(statement).isdisjoint({"torch", "transformers", "mlx"})


@pytest.mark.parametrize("name", [n for n in forgeattention.__all__ if n != "__version__"])
def test_every_public_name_is_there(name):
    assert getattr(forgeattention, name) is not None
    assert name in dir(forgeattention)


def test_unknown_names_raise_as_python_does():
    with pytest.raises(AttributeError, match="module 'forgeattention' has no attribute 'ForgeCash'"):
        _ = forgeattention.ForgeCash


def test_importing_the_cache_registers_forge():
    code = (
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "assert 'forge' not in AttentionInterface()\n"
        "from forgeattention import ForgeCache\n"
        "assert 'forge' in AttentionInterface() and 'forge' in AttentionMaskInterface()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_torch_that_is_too_old_is_named():
    code = (
        "import torch\ntorch.__version__ = type(torch.__version__)('2.8.0+cu128')\n"
        "try:\n    from forgeattention import ForgeCache\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[forgeattention] expected torch 2.9 or newer; got 2.8.0+cu128: upgrade torch")


def test_no_extra_makes_pip_replace_an_installed_torch():
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    named = [need for needs in extras.values() for need in needs if re.match(r"torch\b", need)]
    assert named == ["torch"]
