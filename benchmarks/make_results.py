"""docs/results.md from docs/results/*.md and the JSON files in benchmarks/results.

    python benchmarks/make_results.py            writes docs/results.md
    python benchmarks/make_results.py --check    fails if it is not up to date

The parts are joined in the order of their names. A line of a part of the form

    {{ KIND FILE }}

becomes the table that `result_tables.RENDERERS[KIND]` makes of benchmarks/results/FILE, with a link to the file and
what it says of machine, versions and commit. FILE may hold `*`: the newest date in the name is taken. Everything else
is kept as it is: to add results, put a part beside the others; to give them a table, add a function to
result_tables.py or result_speed.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import result_format
import result_tables

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))
import wrap  # noqa: E402

PARTS, RESULTS, PAGE = ROOT / "docs/results", ROOT / "benchmarks/results", ROOT / "docs/results.md"
HEAD = (
    "<!-- Made by `python benchmarks/make_results.py` from docs/results/*.md and benchmarks/results/*.json.\n"
    "Edit those, not this page: a table is a line `{{ KIND FILE }}` there, a new section a new file there. -->\n"
    "# Results\n"
)
LINE = re.compile(r"^\{\{\s*(\w+)\s+(\S+)\s*\}\}$", re.MULTILINE)
DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


def newest(pattern: str) -> Path:
    """The file in benchmarks/results that matches, of several the one with the latest date in its name.

    Raises:
        ValueError: none matches.
    """
    found = sorted(RESULTS.glob(pattern), key=lambda file: (DATE.findall(file.name)[-1:], file.name))
    if not found:
        raise ValueError(f"[results] expected a file {pattern} in {RESULTS.relative_to(ROOT)}; got none")
    return found[-1]


def fill(text: str) -> str:
    """A part with its tables in place.

    Raises:
        ValueError: an unknown kind or a missing file.
    """

    def table(match: re.Match[str]) -> str:
        kind, file = match[1], newest(match[2])
        if kind not in result_tables.RENDERERS:
            raise ValueError(f"[results] expected a kind in {sorted(result_tables.RENDERERS)}; got {kind!r}")
        content = json.loads(file.read_text())
        link = f"[`{file.name}`](../{file.relative_to(ROOT)})"
        return f"{result_tables.RENDERERS[kind](content)}\n\n{link}: {result_format.conditions(content)}."

    return LINE.sub(table, text)


def page() -> str:
    """What docs/results.md should hold."""
    parts = sorted(PARTS.glob("*.md"))
    return wrap.wrap("\n".join([HEAD, *(fill(part.read_text()).strip() + "\n" for part in parts)]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    wanted = page()
    if parser.parse_args().check:
        if PAGE.read_text() != wanted:
            print(f"{PAGE}: not up to date, run python benchmarks/make_results.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
