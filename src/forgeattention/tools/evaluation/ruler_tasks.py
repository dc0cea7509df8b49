"""The texts of RULER's tasks (arXiv 2404.06654, section 3, table 2 and appendix B): each from a seed and a size."""

from __future__ import annotations

import itertools
import random
import re
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from . import texts
from .haystacks import BORDER
from .needles import COLOURS, PAIRS, PEOPLE, THINGS, TOWNS

NOISE = ("The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",)
ADJECTIVES = (
    "able",
    "bitter",
    "calm",
    "distant",
    "eager",
    "faint",
    "gentle",
    "hollow",
    "idle",
    "jolly",
    "keen",
    "lively",
    "modest",
    "narrow",
    "odd",
    "plain",
    "quiet",
    "rapid",
    "sturdy",
    "tidy",
    "useful",
    "vivid",
    "weary",
    "young",
)
NOUNS = ("acorn", "basket", "candle", "donkey", "engine", "feather", "garden", "helmet", "island", "jacket", "kitchen",
         "ladder", "mirror", "needle", "orchard", "pillow", "quarry", "ribbon", "saddle", "tunnel", "umbrella",
         "valley", "window", "yard")  # fmt: skip
CONSONANTS, VOWELS = "bcdfghjklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Draft:
    """A question: what is shown, how the answer starts, what it must hold."""

    text: str
    prefix: str
    answers: tuple[str, ...]


def _niah(
    draw: random.Random, size: int, *, hay: str, key: str = "word", value: str = "number", keys: int = 1,
    values: int = 1, asked: int = 1,
) -> Draft:  # fmt: skip
    """Needles "the special magic NUMBER of KEY is VALUE".

    Args:
        size: sentences of hay, or needles where the hay is made of them.
        hay: "noise", "essay" or "needles".
        key, value: "word", "number" or "uuid".
        keys: needles with keys of their own; the first `asked` of them are asked for.
        values: values of each key.
    """
    names = list(dict.fromkeys(_label(draw, key) for _ in range(4 * keys + 8)))[:keys]
    pairs = [(name, _label(draw, value)) for name in names for _ in range(values)]
    kind = f"{value}s"

    def sentence(name: str, hidden: str) -> str:
        return f"One of the special magic {kind} of {name} is: {hidden}."

    if hay == "needles":
        filler = [sentence(_label(draw, key), _label(draw, value)) for _ in range(size)]
        lines = [line for line in filler if not any(f" {name} " in line for name in names)]
    else:
        lines = list(itertools.islice(itertools.cycle(NOISE if hay == "noise" else _essay()), size))
    _insert(draw, lines, [sentence(*pair) for pair in pairs])
    wanted = names[:asked]
    answers = tuple(hidden for name, hidden in pairs if name in wanted)
    query = ", ".join(wanted[:-1]) + (" and " if len(wanted) > 1 else "") + wanted[-1]
    separator = "\n" if hay in ("needles", "noise") else " "
    return Draft(
        f"Some special magic {kind} are hidden in the following text. Remember them: you will be asked for them "
        f"afterwards.\n{separator.join(lines)}\nWhat are all the special magic {kind} of {query} in the text above?",
        f"The special magic {kind} of {query} in the text are",
        answers,
    )


def _variable_tracking(draw: random.Random, size: int, *, chains: int = 1, hops: int = 4) -> Draft:
    """Chains of assignments VAR B = VAR A among noise: which variables hold the value?"""

    def block(length: int, lines: list[str]) -> tuple[str, str, list[str]]:
        names = [[_letters(draw) for _ in range(hops + 1)] for _ in range(chains)]
        start = [str(draw.randrange(10000, 100000)) for _ in range(chains)]
        sentences = []
        for chain, number in zip(names, start):
            own = [f"VAR {chain[0]} = {number}."] + [f"VAR {b} = VAR {a}." for a, b in zip(chain, chain[1:])]
            sentences.append(own)
        spots = [sorted(draw.randrange(len(lines) + 1) for _ in own) for own in sentences]
        placed = sorted(
            ((at, i, line) for own, at_all in zip(sentences, spots) for i, (at, line) in enumerate(zip(at_all, own))),
            reverse=True,
        )
        for at, _, line in placed:
            lines.insert(at, line)
        return start[0], "\n".join(lines), names[0]

    ask = "Which variables hold the value {0}? They are {1} in number:"
    shown_value, shown, shown_names = block(hops, list(NOISE) * 4)
    value, text, names = block(hops, list(itertools.islice(itertools.cycle(NOISE), size)))
    rule = "Follow the assignments of variables hidden in the text.\n\n"
    example = f"{shown}\n{ask.format(shown_value, hops + 1)} {' '.join(shown_names)}\n\n"
    return Draft(
        f"{rule}{example}{rule}{text}\nQuestion: which variables hold the value {value}, directly or through others?",
        ask.format(value, hops + 1),
        tuple(names),
    )


def _common_words(draw: random.Random, size: int, *, common: int = 10, often: int = 30, seldom: int = 3) -> Draft:
    """A numbered list of words, ten of them far more frequent than the others."""

    def block(words: int, many: int, few: int) -> tuple[str, tuple[str, ...]]:
        names = list(dict.fromkeys(f"{draw.choice(ADJECTIVES)}{draw.choice(NOUNS)}{_syllables(draw, 1)}"
                                   for _ in range(2 * words + 40)))[: common + words]  # fmt: skip
        entries = names[:common] * many + names[common:] * few
        draw.shuffle(entries)
        return " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1)), tuple(names[:common])

    shown, shown_words = block(20, 6, 1)
    text, words = block(size, often, seldom)
    ask = f"What are the {common} most common words in the list above?"
    rule = "Below is a numbered list of words. Some words stand in it more often than others.\n"
    listed = " ".join(f"{i}. {word}" for i, word in enumerate(shown_words, 1))
    return Draft(
        f"{rule}{shown}\n{ask} {listed}\n\n{rule}{text}\n{ask}",
        f"The {common} most common words in the list are:",
        words,
    )


def _frequent_words(draw: random.Random, size: int, *, alpha: float = 2.0, vocabulary: int = 2000) -> Draft:
    """A coded text whose words are as frequent as Zipf's law says: the three most frequent."""
    words = list(dict.fromkeys(_syllables(draw, 3) for _ in range(2 * vocabulary)))[:vocabulary]
    weights = [(rank + 1) ** -alpha for rank in range(len(words))]
    total = sum(weights)
    # The most frequent word is noise, "...", as published; counts are the law's own, so that the answer is sure.
    length = 30 * size + 30
    counts = [max(1, int(length * weight / total)) for weight in weights]
    entries: list[str] = []
    for rank, (word, count) in enumerate(zip(words, counts)):
        if len(entries) > length:
            break
        entries += ["..." if rank == 0 else word] * count
    draw.shuffle(entries)
    ask = "What are the three most frequent words in the coded text above? Dots are no word."
    return Draft(
        f"Read the following coded text and keep track of how often each coded word stands in it.\n"
        f"{' '.join(entries)}\n{ask}",
        "The three most frequent coded words are:",
        tuple(words[1:4]),
    )


def _questions(draw: random.Random, size: int, *, hops: int) -> Draft:
    """Paragraphs about people, one of which (two, for two hops) holds the answer."""
    documents, people = [], []
    for _i in range(max(size, 2) + 1):
        name = f"{draw.choice(PEOPLE).split()[0]} {_syllables(draw, 3).capitalize()}"
        ship = f"{draw.choice(COLOURS).capitalize()} {draw.choice(THINGS).capitalize()} {_syllables(draw, 2).upper()}"
        town, gift = draw.choice(TOWNS), f"{draw.choice(ADJECTIVES)} {draw.choice(PAIRS)}"
        people.append((name, ship, gift))
        documents.append(
            f"{name} was born in {town} and served as a mate on the {ship}. In later years {name} kept a shop near the "
            f"market and was known for a walk along the quay every evening."
        )
        documents.append(
            f"The {ship} was built in {town} and carried mail for {draw.randrange(5, 40)} years. On the day it was "
            f"sold, its crew was given a {gift}, which is still on show."
        )
    name, ship, gift = people[draw.randrange(len(people))]
    draw.shuffle(documents)
    shown = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, 1))
    if hops == 1:
        question = f"On which ship did {name} serve as a mate?"
        answer = ship
    else:
        question = f"What was given to the crew of the ship on which {name} served?"
        answer = gift
    rule = "Answer the question from the documents. Give the answer alone, without any other words."
    return Draft(f"{rule}\n\n{shown}\n\n{rule}\nQuestion: {question}", "Answer:", (answer,))


def _insert(draw: random.Random, lines: list[str], needles: list[str]) -> None:
    """Put needles at random places between lines."""
    for needle, at in zip(needles, sorted((draw.randrange(len(lines) + 1) for _ in needles), reverse=True)):
        lines.insert(at, needle)


def _label(draw: random.Random, kind: str) -> str:
    if kind == "number":
        return str(draw.randrange(10**6, 10**7))
    if kind == "uuid":
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))
    return f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"


def _letters(draw: random.Random) -> str:
    return "".join(draw.choices(string.ascii_uppercase, k=5))


def _syllables(draw: random.Random, count: int) -> str:
    return "".join(draw.choice(CONSONANTS) + draw.choice(VOWELS) for _ in range(count))


@cache
def _essay() -> tuple[str, ...]:
    """Sentences of prose, over and over."""
    return tuple(re.sub(r"\s+", " ", sentence).strip() for sentence in BORDER.split(texts.read("genesis")))


TASKS: dict[str, Callable[[random.Random, int], Draft]] = {
    "niah_single_1": partial(_niah, hay="noise"),
    "niah_single_2": partial(_niah, hay="essay"),
    "niah_single_3": partial(_niah, hay="essay", value="uuid"),
    "niah_multikey_1": partial(_niah, hay="essay", keys=4),
    "niah_multikey_2": partial(_niah, hay="needles"),
    "niah_multikey_3": partial(_niah, hay="needles", key="uuid", value="uuid"),
    "niah_multivalue": partial(_niah, hay="essay", values=4),
    "niah_multiquery": partial(_niah, hay="essay", keys=4, asked=4),
    "vt": _variable_tracking,
    "cwe": _common_words,
    "fwe": _frequent_words,
    "qa_1": partial(_questions, hops=1),
    "qa_2": partial(_questions, hops=2),
}
