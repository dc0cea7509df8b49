"""Haystacks of a given length, and needles put into them at given depths."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import texts
from .needles import Hidden, Outcome, judge

# Between two sentences: the first ends in a word, not in the number of a list; the second starts like a sentence.
BORDER = re.compile(r"""(?<=[A-Za-z)"'][.!?])\s+(?=["'(]?[A-Z])""")
LINE = re.compile(r"\n+")


@dataclass(frozen=True)
class Document:
    """A haystack with needles in it, and the questions about them.

    Attributes:
        test: which test this is.
        haystack: name of the text.
        length: tokens of the haystack.
        text: haystack and needles.
        hay: the haystack alone.
        asked: depth and needle of every question.
        decoys: per question, answers that would be wrong.
    """

    test: str
    haystack: str
    length: int
    text: str
    hay: str
    asked: tuple[tuple[float, Hidden], ...]
    decoys: tuple[tuple[str, ...], ...]


def haystack(tokenizer: Any, length: int, text: str | None = None) -> str:
    """The first `length` tokens of a text.

    Args:
        tokenizer: the model's tokenizer.
        length: tokens, at least 1.
        text: what to take them from; if None the shipped licence texts and, where they end, others (`texts.endless`).

    Raises:
        ValueError: the text has fewer tokens.
    """
    # No tokenizer in use makes tokens of more than 8 characters of such text on average.
    text = texts.endless("licences", 8 * length) if text is None else text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not 1 <= length <= len(ids):
        raise ValueError(f"[niah] expected a haystack length from 1 to the text's {len(ids)} tokens; got {length}")
    return tokenizer.decode(ids[:length])


def named(tokenizer: Any, name: str, length: int, seed: int = 0) -> str:
    """The first `length` tokens of the text called `name` (`texts.endless`)."""
    return haystack(tokenizer, length, texts.endless(name, 8 * length, seed))


def place(hay: str, needle: Hidden, depth: float, *, lines: bool = False) -> str:
    """Put the needle's sentence at the last sentence border at or before `depth` of the haystack; see `scatter`."""
    return scatter(hay, [(depth, needle)], lines=lines)


def scatter(hay: str, hidden: Sequence[tuple[float, Hidden]], *, lines: bool = False) -> str:
    """Put sentences into a haystack, each at the last border at or before its depth.

    Args:
        hay: the haystack; it must not speak of a needle itself.
        hidden: depths and what to hide there. A depth is the share of the haystack's characters that come before, from
            0 (in front) to 1 (at the end).
        lines: hide between lines, not between sentences.

    Raises:
        ValueError: a depth outside [0, 1], or a haystack that holds a part of a needle.
    """
    for depth, needle in hidden:
        if not 0 <= depth <= 1:
            raise ValueError(f"[niah] expected a depth in [0, 1]; got {depth}")
        for trace in needle.traces:
            if re.search(rf"(?<!\w){re.escape(trace)}(?!\w)", hay) or judge(hay, needle) is not Outcome.FAIL:
                raise ValueError(f"[niah] expected a haystack without {trace!r}; got one with it")
    borders = [0, *(match.end() for match in (LINE if lines else BORDER).finditer(hay))]
    out, done = "", 0
    for depth, needle in sorted(hidden, key=lambda item: item[0]):
        at = len(hay) if depth == 1 else borders[bisect_right(borders, int(len(hay) * depth)) - 1]
        out += hay[done:at]
        done = at
        gap = "\n" if lines else " "
        if at == len(hay):
            out = f"{out.rstrip()}{gap}{needle.sentence}"
        else:
            out += f"{needle.sentence}{gap}"
    return out + hay[done:]
