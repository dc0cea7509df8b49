"""Texts to read and to hide things in: shipped, generated from a seed, or anyone's own file."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

TEXTS = ("licences", "genesis")
GENERATED = ("code", "json", "table", "mixed")
MIXED_CHARS = 3000
"""Characters of one kind at a time in "mixed"."""
# Modules of the standard library that are long, old and plain.
MODULES = ("argparse", "calendar", "configparser", "csv", "difflib", "gettext", "heapq", "inspect", "mailbox",
           "optparse", "pickletools", "platform", "pstats", "shutil", "statistics", "tarfile", "textwrap",
           "typing")  # fmt: skip


def read(name: str) -> str:
    """A shipped text by name, Python's own source ("code"), or the text file at a path (UTF-8).

    Raises:
        ValueError: neither a name nor a readable text file.
    """
    if name in TEXTS:
        return resources.files(__package__).joinpath("data", f"{name}.txt").read_text(encoding="utf-8")
    if name == "code":
        return _code()
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"[texts] expected a name in {(*TEXTS, 'code')} or a text file; got {name!r}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"[texts] expected UTF-8 text; got {name!r}, which is not") from error


def enough(name: str, chars: int, seed: int = 0) -> str:
    """A text of at least `chars` characters where `name` is generated without end; else all of `read(name)`.

    "json" is one object a line, "table" a Markdown table, "mixed" takes turns between all kinds; where prose and source
    end there, invented sentences take their place. Numbers have neither four nor seven digits, so that none is a
    needle's. The same seed gives the same text.
    """
    if name not in GENERATED or name == "code":
        return read(name)
    pieces, size = [], 0
    for piece in _STREAMS[name](seed):
        pieces.append(piece)
        size += len(piece)
        if size >= chars:
            break
    return "".join(pieces)


def endless(name: str, chars: int, seed: int = 0) -> str:
    """A text of at least `chars` characters that does not start over.

    Where shipped prose or Python's source ends, the other shipped prose follows, then invented sentences of which no
    two are alike. A file of one's own stays as it is.
    """
    text = enough(name, chars, seed)
    if name not in (*TEXTS, "code"):
        return text
    for more in itertools.chain((read(other) for other in TEXTS if other != name), [""]):
        if len(text) >= chars:
            return text
        text += f"\n{more}"
    pieces, size = [text], len(text)
    for paragraph in _sentences(seed):
        if size >= chars:
            break
        pieces.append(paragraph)
        size += len(paragraph)
    return "".join(pieces)


def by_line(name: str) -> bool:
    """Whether sentences are hidden between lines of this text, not between its sentences."""
    return name in GENERATED or Path(name).suffix in (".py", ".json", ".jsonl", ".csv", ".md", ".c", ".cpp", ".rs")


def _code() -> str:
    sources = []
    for module in MODULES:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            raise ValueError(f"[texts] expected the source of Python's module {module}; got none")
        sources.append(Path(spec.origin).read_text(encoding="utf-8"))
    return "\n".join(sources)


NAMES = ("Ada", "Boris", "Chen", "Dalia", "Emil", "Farah", "Goran", "Hanna", "Ivo", "Jun", "Kofi", "Lena")
GOODS = (
    "bolts",
    "canvas",
    "cedar",
    "copper wire",
    "flour",
    "glass",
    "lamp oil",
    "nails",
    "paper",
    "rope",
    "salt",
    "tin",
)
CITIES = ("Aarhus", "Bergen", "Cork", "Dresden", "Essen", "Faro", "Ghent", "Hull", "Izmir", "Jena", "Kiel", "Lund")


DEEDS = (
    "On day {day} {name} of {city} sold {count} crates of {goods} to {other} of {town} for {price} crowns.",
    "{name} wrote from {city} that {count} barrels of {goods} had reached {town}, at {price} crowns each.",
    "The warehouse in {city} lent {name} {count} sacks of {goods} until day {day}, and {other} signed for them.",
    "A storm kept {count} boxes of {goods} in {city} on day {day}, so {name} bought others in {town} for {price}.",
    "{name} and {other} shared {count} rolls of {goods} between {city} and {town}; the cart cost {price} crowns.",
    "In {city} the price of {goods} rose to {price} crowns on day {day}; {name} had {count} pounds left in {town}.",
)


def _row(draw: random.Random) -> tuple[int, str, str, str, int, str]:
    return (
        draw.randrange(10000, 100000),
        draw.choice(NAMES),
        draw.choice(CITIES),
        draw.choice(GOODS),
        draw.randrange(1, 1000),
        f"{draw.randrange(1, 1000)}.{draw.randrange(10, 100)}",
    )


def _json(seed: int) -> Iterator[str]:
    draw = random.Random(f"json {seed}")
    while True:
        number, name, city, goods, count, price = _row(draw)
        record = {"order": number, "buyer": {"name": name, "city": city}, "goods": goods, "count": count,
                  "price": float(price), "paid": draw.random() < 0.5}  # fmt: skip
        yield json.dumps(record) + "\n"


def _table(seed: int) -> Iterator[str]:
    draw = random.Random(f"table {seed}")
    yield "| order | buyer | city | goods | count | price |\n|---|---|---|---|---|---|\n"
    while True:
        yield "| " + " | ".join(map(str, _row(draw))) + " |\n"


def _sentences(seed: int) -> Iterator[str]:
    """Invented sentences, a paragraph of six a line, no sentence twice."""
    draw, told = random.Random(f"sentences {seed}"), set[str]()
    paragraph: list[str] = []
    while True:
        _, name, city, goods, count, price = _row(draw)
        other, town, day = draw.choice(NAMES), draw.choice(CITIES), draw.randrange(1, 366)
        sentence = draw.choice(DEEDS).format(
            name=name, other=other, city=city, town=town, goods=goods, count=count, price=price, day=day
        )
        if sentence in told:
            continue
        told.add(sentence)
        paragraph.append(sentence)
        if len(paragraph) == 6:
            yield " ".join(paragraph) + "\n"
            paragraph = []


def _mixed(seed: int) -> Iterator[str]:
    more = _sentences(seed)
    prose = [itertools.chain(read(name).splitlines(keepends=True), more) for name in (*TEXTS, "code")]
    for stream in itertools.cycle([*prose, _json(seed), _table(seed)]):
        size = 0
        while size < MIXED_CHARS:
            line = next(stream)
            size += len(line)
            yield line


_STREAMS = {"json": _json, "table": _table, "mixed": _mixed}
