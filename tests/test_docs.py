"""README and docs: code blocks run, commands parse, links lead somewhere, lines are short, the API page is current.

A code block follows `<!-- needs: cuda -->`, `mlx`, `vllm` or `hub` where it needs what a test has not; such a block is
compiled only. All others run, in order, one page a process-wide namespace with a tiny model in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers

from forgeattention.tools import cli
from tests.tiny import llama, tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
BLOCK = re.compile(r"(?:<!-- needs: (\w+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WIDTH = 100


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(what it needs, text) of each block of a language in a page."""
    return [(needs, text) for needs, kind, text in BLOCK.findall(page.read_text()) if kind == language]


PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Hub names give a tiny Llama; `model`, `inputs` and `prompt` are there as the pages assume."""
    from forgeattention import ForgeCache  # registers "forge"

    def load(name: str, **options):
        return llama(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64, **options).float()

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer())
    monkeypatch.chdir(tmp_path)
    text = "The night train to Lisbon leaves at nine. " * 10
    model = load("tiny", attn_implementation="forge")
    return {"ForgeCache": ForgeCache, "model": model, "inputs": tokenizer()(text, return_tensors="pt"), "torch": torch}


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_blocks_run(page, stand_ins):
    for needs, text in blocks(page, "python"):
        code = compile(text, str(page), "exec")
        if not needs:
            exec(code, stand_ins)


def test_a_block_that_is_wrong_fails(stand_ins, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nforgeattention_is_not_imported.x\n```\n")
    with pytest.raises(NameError):
        test_python_blocks_run(page, stand_ins)


def test_the_quickstart_prints_both_answers_and_both_sizes(stand_ins, capsys):
    exec(blocks(ROOT / "README.md", "python")[0][1], {})
    *answers, sizes = capsys.readouterr().out.strip().splitlines()
    packed, exact = re.fullmatch(r"(\d+) bytes vs (\d+)", sizes).groups()
    assert answers
    assert 0 < int(packed) < int(exact)


def commands(page: Path, program: str) -> list[str]:
    """The lines of a page's shell blocks that start with a program, joined where a line ends in a backslash."""
    text = "\n".join(text for _, text in blocks(page, "")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.startswith(program + " ")]


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p, "forgeattn")], ids=lambda page: page.name)
def test_commands_parse(page):
    for line in commands(page, "forgeattn"):
        argv = shlex.split(line, comments=True)[1:]
        args, others = cli.build_parser().parse_known_args(argv)
        assert not others or getattr(args, "passes_on", False), line
        assert isinstance(args, argparse.Namespace)


def test_targets_and_extras_exist():
    makefile, pyproject = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    extras = set(re.findall(r"^([\w-]+) = \[", pyproject.split("[project.optional-dependencies]")[1], re.MULTILINE))
    for page in PAGES:
        for line in commands(page, "make"):
            assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE), line
        for line in commands(page, "pip"):
            for named in re.findall(r"(?:forgeattention|\.)\[([\w,-]+)\]", line):
                assert set(named.split(",")) <= extras, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, heading = target.partition("#")
        file = page if not name else (page.parent / name).resolve()
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short(page):
    lines = enumerate(page.read_text().splitlines(), 1)
    if page.name in ("mlx-families.md", "results.md"):  # scripts make their tables and headings
        lines = [(i, line) for i, line in lines if not line.startswith(("|", "#", "<"))]
    # A link or a code span cannot be broken.
    long = [
        f"{i}: {line}" for i, line in lines if len(line) > WIDTH and " " in re.sub(r"\[.*?\]\(.*?\)|`.*?`", "", line)
    ]
    assert long == []


def test_wrapping_keeps_links_and_leaves_tables_and_code():
    wrap = load_script("wrap")
    text = (
        "- " + "word " * 30 + "[a link of words](x.md) `a b`\n\n| " + "x" * 120 + " |\n\n```\n" + "y" * 120 + "\n```\n"
    )
    lines = wrap.wrap(text).split("\n")
    assert lines[0].startswith("- word")
    assert lines[1].startswith("  word")
    assert max(len(line) for line in lines[:2]) <= WIDTH
    assert text.split("\n", 1)[1] in wrap.wrap(text)
    assert wrap.wrap(wrap.wrap(text)) == wrap.wrap(text)
    assert "[a link of words](x.md)" in wrap.wrap(text)


def load_script(name: str):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_page_is_what_the_docstrings_say():
    make_api = load_script("make_api")
    assert (ROOT / "docs" / "api.md").read_text() == make_api.page(), "run `make docs`"


def test_the_first_screen_of_the_readme_holds_what_a_stranger_needs():
    head = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    for part in ("pip install", "forgeattn doctor", "from forgeattention import ForgeCache", "frontier.png", "exact |"):
        assert part in head
    assert re.search(r"\| transformers \|.*\n\| mlx-lm \|.*\n\| vLLM", head)
    assert "[Results](" in head


def test_files_and_folders_named_in_contributing_exist():
    for name in re.findall(r"`((?:src|tests|docs|benchmarks)/[\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text()):
        assert (ROOT / name).exists(), name


def test_linters_have_one_version_for_make_and_for_commits():
    """What `make lint` passes, pre-commit passes."""
    pinned = dict(re.findall(r"^(ruff|clang-format)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    found = re.findall(r"/(?:mirrors-)?(ruff|clang-format)(?:-pre-commit)?\n\s+rev: v(\S+)", hooks)
    assert dict(found) == pinned
    assert len(found) == 2
