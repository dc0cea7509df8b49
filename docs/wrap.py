"""Wraps paragraphs and list items of Markdown at 100 columns: `python docs/wrap.py FILE ...`, as `make format` does.

Only blocks with a longer line are wrapped; tables, code, headings and comments stay. `--check` changes nothing and
fails where there is something to wrap.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

WIDTH = 100
ITEM = re.compile(r"(\s*)([-*]|\d+\.)\s+")
WHOLE = re.compile(r"(`[^`\n]+`|!?\[[^\]]*\]\([^)]*\))")


def wrap(text: str) -> str:
    """The text with no paragraph or list item over `WIDTH` columns, as far as words, code and links allow."""
    lines, out, i, fenced = text.split("\n"), list[str](), 0, False
    while i < len(lines):
        line = lines[i]
        fenced ^= line.lstrip().startswith("```")
        if fenced or not is_prose(line):
            out.append(line)
            i += 1
            continue
        end = i + 1
        while end < len(lines) and is_prose(lines[end]) and not ITEM.match(lines[end]):
            end += 1
        block = lines[i:end]
        out += fill(block) if any(len(each) > WIDTH for each in block) else block
        i = end
    return "\n".join(out)


def is_prose(line: str) -> bool:
    """Whether a line belongs to a paragraph or a list item."""
    return bool(line.strip()) and not line.startswith(("|", "#", "<", "    ")) and not line.lstrip().startswith("```")


def fill(block: list[str]) -> list[str]:
    """One paragraph or list item, wrapped; code spans and links stay whole."""
    item = ITEM.match(block[0])
    first = item[0] if item else re.match(r"\s*", block[0])[0]
    text = " ".join(line.strip() for line in [block[0][len(first) :], *block[1:]])
    parts = [part.replace(" ", "\0") if i % 2 else part for i, part in enumerate(WHOLE.split(text))]
    lines = textwrap.wrap(
        "".join(parts), WIDTH, initial_indent=first, subsequent_indent=" " * len(first),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return [line.replace("\0", " ") for line in lines]


def main() -> int:
    """Wraps the files that are named, or with --check says which need it."""
    names = [name for name in sys.argv[1:] if name != "--check"]
    long = []
    for path in map(Path, names):
        before = path.read_text()
        if (after := wrap(before)) != before:
            long.append(str(path))
            if "--check" not in sys.argv:
                path.write_text(after)
    if long and "--check" in sys.argv:
        print("lines over 100 columns, run `make format`:", *long, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
