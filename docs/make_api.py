"""Writes docs/api.md from the docstrings of the public names: `python docs/make_api.py` (or `make docs`).

The source is read, not imported, so that the page is the same wherever it is made.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "forgeattention"
WIDTH = 100

SECTIONS = {
    "forgeattention": "The package's own names. Each is imported when it is first used.",
    "forgeattention.codec": "How keys and values are coded.",
    "forgeattention.integrations.mlx": "Packed prompt caches in mlx-lm.",
    "forgeattention.sparse": "Which packed tokens a decode step reads.",
    "forgeattention.eviction": "Which tokens are kept in memory.",
    "forgeattention.cache": "The cache of one layer, below the integrations.",
    "forgeattention.ops": "The operations on packed pages; each takes NumPy, torch or MLX arrays.",
}


def main() -> None:
    """Writes the page."""
    (ROOT / "docs" / "api.md").write_text(page())


def page() -> str:
    """The whole page as Markdown."""
    out = ["# API", "", "Made from the docstrings by `make docs`; do not edit by hand.", ""]
    described: dict[tuple[Path, str], str] = {}
    for module, about in SECTIONS.items():
        out += [f"## {module}", "", about, ""]
        for name in public_names(module):
            found = definition(module, name)
            if found is None:
                continue
            path, node = found
            if (first := described.setdefault((path, node_name(node)), module)) != module:
                out += [f"### {name}", "", f"See [{first}](#{first.replace('.', '')}).", ""]
            else:
                out += describe(name, node)
    return "\n".join(out).rstrip() + "\n"


def source_of(module: str) -> Path:
    """The file of a module."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def public_names(module: str) -> list[str]:
    """What `__all__` of a module lists."""
    for node in ast.parse(source_of(module).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if name != "__version__"]
    raise ValueError(f"[make_api] expected __all__ in {module}; got none")


def definition(module: str, name: str) -> tuple[Path, ast.stmt] | None:
    """The file and statement that define a public name, found by following imports; None for a plain value."""
    path = source_of(module)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return path, node
        if isinstance(node, ast.ImportFrom) and node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    base = package.split(".")[: len(package.split(".")) - node.level + 1]
                    return definition(".".join([*base, *(node.module or "").split(".")]).rstrip("."), alias.name)
    return None


def node_name(node: ast.stmt) -> str:
    """The name of a class or function."""
    assert isinstance(node, ast.ClassDef | ast.FunctionDef)
    return node.name


def describe(name: str, node: ast.stmt) -> list[str]:
    """The entry of one class, with its public methods, or of one function."""
    if isinstance(node, ast.FunctionDef):
        return [f"### {name}", "", *signature(node, name), *prose(ast.get_docstring(node))]
    assert isinstance(node, ast.ClassDef)
    out = [f"### {name}", ""]
    members = [m for m in node.body if isinstance(m, ast.FunctionDef)]
    for member in members:
        if member.name == "__init__":
            out += signature(member, name)
    out += prose(ast.get_docstring(node))
    for member in members:
        text = ast.get_docstring(member)
        if (
            member.name.startswith("_")
            or text is None
            or any("setter" in ast.unparse(d) for d in member.decorator_list)
        ):
            continue
        if any(ast.unparse(d) in ("property", "cached_property") for d in member.decorator_list):
            out += [f"**{name}.{member.name}**", "", *prose(text)]
        else:
            out += [f"**{name}.{member.name}**", "", *signature(member, member.name), *prose(text)]
    return out


def signature(node: ast.FunctionDef, name: str) -> list[str]:
    """A code block with the call, one parameter a line where it is long."""
    arguments = node.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        arguments = ast.arguments(**{**vars(arguments), "args": arguments.args[1:]})
    text = f"{name}({ast.unparse(arguments)})"
    if node.returns is not None and name == node.name:
        text += f" -> {ast.unparse(node.returns)}"
    lines = textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return ["```text", *lines, "```", ""]


def prose(docstring: str | None) -> list[str]:
    """A Google-style docstring as Markdown: paragraphs, code by indentation, lists for Args, Returns and so on."""
    out: list[str] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring or "")):
        lines = block.splitlines()
        head = lines[0].rstrip() if lines else ""
        if re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields|Example|Examples):", head):
            out += [f"*{head[:-1]}*", "", *entries(textwrap.dedent("\n".join(lines[1:])))]
        elif lines and all(line.startswith("    ") for line in lines):
            out += ["```text", *textwrap.dedent(block).splitlines(), "```"]
        else:
            out += wrap(" ".join(line.strip() for line in lines))
        out.append("")
    return out


def entries(text: str) -> list[str]:
    """The items of an Args block as a list; lines that are indented continue the item above."""
    items: list[str] = []
    for line in text.splitlines():
        if line.startswith(" ") and items:
            items[-1] += " " + line.strip()
        else:
            items.append(line.strip())
    return [line for item in items for line in wrap(item, "- ")]


def wrap(text: str, first: str = "") -> list[str]:
    """Text in lines of at most `WIDTH` columns; code spans and links stay whole."""
    parts = re.split(r"(`[^`]+`)", text)
    whole = "".join(part.replace(" ", "\0") if i % 2 else part for i, part in enumerate(parts))
    lines = textwrap.wrap(
        whole,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [
        line.replace("\0", " ").replace("<", "&lt;") if "`" not in line else line.replace("\0", " ") for line in lines
    ]


if __name__ == "__main__":
    main()
