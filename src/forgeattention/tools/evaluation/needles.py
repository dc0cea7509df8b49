"""What is hidden in a haystack, what is asked about it, and what counts as an answer.

Only what the model generated is ever judged. The code word and its outcomes are those of the ForgeAttention drop for
Apple silicon (turboquant_plus, pull request 76); the other kinds follow RULER (arXiv 2404.06654), the normalisation of
free answers SQuAD (arXiv 1606.05250, section 6.1).
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

ECHO_WORDS = 8
"""A reply with a run of so many words of the haystack itself recites the text; it does not answer."""
KINDS = ("code", "number", "uuid", "sentence")
COLOURS = ("PURPLE", "SILVER", "CRIMSON", "AMBER", "COBALT", "IVORY", "SCARLET", "EMERALD", "BRONZE", "INDIGO")
THINGS = ("ELEPHANT", "COMPASS", "LANTERN", "FALCON", "ANCHOR", "ORCHID", "HAMMER", "PIGEON", "TEAPOT", "VIOLIN")
PLACES = ("north gate", "old harbour", "east tower", "water mill", "round house", "long bridge", "salt cellar")
TOWNS = ("Brackwater", "Ostermere", "Dunlow", "Fennick", "Hallowby", "Marrowgate", "Pellworth", "Quillham")
PEOPLE = ("Ida Marlow", "Tomas Reed", "Greta Lindqvist", "Oskar Bell", "Nora Whitfield", "Jonas Petrel", "Mabel Stroud")
PAIRS = ("silver heron", "smoked trout", "broken wheel", "copper kettle", "velvet glove", "paper crane", "wooden flute",
         "honey cake", "green lantern", "iron bell", "striped scarf", "black walnut")  # fmt: skip


class Outcome(StrEnum):
    """What a generated text says about the needle; only PASS is a pass.

    CONFUSED names a decoy, alone or beside the answer. ECHO holds the answer among words of the haystack.
    """

    PASS = "PASS"
    PARTIAL_WORD = "PARTIAL_WORD"
    PARTIAL_NUMBER = "PARTIAL_NUMBER"
    CONFUSED = "CONFUSED"
    ECHO = "ECHO"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Needle:
    """A code word and a number, hidden in one sentence; `of` says whose code word it is where there are several."""

    word: str = "PURPLE ELEPHANT"
    number: str = "7742"
    of: str = ""

    @property
    def answer(self) -> str:
        return f"{self.word} {self.number}".strip()

    @property
    def sentence(self) -> str:
        return f"The secret code word{self._owner} is {self.answer}."

    @property
    def question(self) -> str:
        return (
            f"What is the secret code word{self._owner} mentioned earlier? "
            "Answer with just the code word and number, nothing else:"
        )

    @property
    def traces(self) -> tuple[str, ...]:
        """What a haystack must not hold."""
        return tuple(part for part in (self.word, self.number) if part)

    @property
    def _owner(self) -> str:
        return f" of the {self.of}" if self.of else ""


@dataclass(frozen=True)
class Fact:
    """Any other sentence with a question and its answer.

    Attributes:
        free: the answer may be said in other case, punctuation and articles; else it must stand in the reply exactly.
    """

    sentence: str
    question: str
    answer: str
    free: bool = False

    @property
    def traces(self) -> tuple[str, ...]:
        return (self.answer,)


Hidden = Needle | Fact


def judge(generated: str, needle: Hidden, *, decoys: Sequence[str] = (), hay: str = "") -> Outcome:
    """Search a generated text for the answer, as whole words, case-sensitively unless the fact is `free`.

    Args:
        generated: what the model generated. The prompt holds the needle and must not be part of it.
        needle: what was hidden.
        decoys: wrong answers of the same kind that the prompt holds too; a reply with one of them is no pass.
        hay: the haystack without the needle; a reply that recites it is no pass.
    """
    free = isinstance(needle, Fact) and needle.free
    if any(_found(decoy, generated, free) for decoy in decoys):
        return Outcome.CONFUSED
    if _found(needle.answer, generated, free):
        return Outcome.ECHO if hay and echoes(generated, hay) else Outcome.PASS
    if isinstance(needle, Fact):
        return Outcome.FAIL
    if needle.word and _found(needle.word, generated, False):
        return Outcome.PARTIAL_WORD
    return Outcome.PARTIAL_NUMBER if needle.number and _found(needle.number, generated, False) else Outcome.FAIL


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, words one space apart."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def echoes(generated: str, hay: str, words: int = ECHO_WORDS) -> bool:
    """Whether `words` words in a row of the generated text stand so in the haystack."""
    said, text = normalise(generated).split(), f" {normalise(hay)} "
    return any(f" {' '.join(said[i : i + words])} " in text for i in range(len(said) - words + 1))


def make(kind: str, seed: int) -> Hidden:
    """A needle of one of `KINDS`, the same for the same seed; seed 0 of "code" is PURPLE ELEPHANT 7742.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"[niah] expected a needle of kind {KINDS}; got {kind!r}")
    draw = random.Random(f"{kind} {seed}")
    if kind == "code":
        if seed == 0:
            return Needle()
        return Needle(f"{draw.choice(COLOURS)} {draw.choice(THINGS)}", str(draw.randrange(1000, 10000)))
    place = draw.choice(PLACES)
    if kind == "sentence":
        person, town, hidden = draw.choice(PEOPLE), draw.choice(TOWNS), draw.choice(PAIRS)
        return Fact(
            f"{person} of {town} always hides the spare key under the {hidden}.",
            f"Under what does {person} of {town} always hide the spare key? Answer in a few words:",
            hidden,
            free=True,
        )
    if kind == "number":
        value, name = str(draw.randrange(10**6, 10**7)), "special magic number"
    else:
        value, name = str(uuid.UUID(int=draw.getrandbits(128), version=4)), "special magic uuid"
    return Fact(
        f"The {name} of the {place} is {value}.",
        f"What is the {name} of the {place} mentioned earlier? Answer with just the {name.split()[-1]}, nothing else:",
        value,
    )


def several(count: int, seed: int = 0) -> list[Needle]:
    """Code words of `count` different places, no two alike in word or number.

    Raises:
        ValueError: more than there are places.
    """
    if not 1 <= count <= len(PLACES):
        raise ValueError(f"[niah] expected 1 to {len(PLACES)} needles; got {count}")
    draw = random.Random(f"several {seed}")
    colours, things = draw.sample(COLOURS, count), draw.sample(THINGS, count)
    numbers = draw.sample(range(1000, 10000), count)
    return [Needle(f"{a} {b}", str(n), of) for a, b, n, of in zip(colours, things, numbers, draw.sample(PLACES, count))]


def near(needle: Needle, count: int, seed: int = 0) -> list[Needle]:
    """Distractors: the same word, the nearest numbers, other places.

    Raises:
        ValueError: the needle's number has no room for so many neighbours, or there are not so many other places.
    """
    places = [place for place in PLACES if place != needle.of]
    if not 1 <= count <= len(places) or not needle.number.isdigit() or int(needle.number) < count:
        raise ValueError(f"[niah] expected 1 to {len(places)} distractors of a numbered needle; got {count}, {needle}")
    steps = [step for i in range(1, count + 1) for step in (-i, i)][:count]
    chosen = random.Random(f"near {seed}").sample(places, count)
    width = len(needle.number)
    return [
        replace(needle, number=str(int(needle.number) + step).zfill(width), of=of) for step, of in zip(steps, chosen)
    ]


def facts(seed: int = 0) -> list[Fact]:
    """Five facts in plain sentences, each with its question; no two answers alike."""
    draw = random.Random(f"facts {seed}")
    people, towns, pairs = draw.sample(PEOPLE, 5), draw.sample(TOWNS, 5), draw.sample(PAIRS, 5)
    forms = (
        ("{0} of {1} named the new boat {2}.", "What did {0} of {1} name the new boat?"),
        ("The town of {1} gave {0} a {2} for saving the ferry.", "What did the town of {1} give {0}?"),
        ("At the fair in {1}, {0} won first prize with a {2}.", "With what did {0} win first prize in {1}?"),
        ("{0} left a {2} on the night train to {1}.", "What did {0} leave on the night train to {1}?"),
        ("The painter {0} is known in {1} for a picture of a {2}.",
         "Of what is the picture for which {0} is known in {1}?"),
    )  # fmt: skip
    return [
        Fact(form.format(person, town, pair), f"{ask.format(person, town)} Answer in a few words:", pair, free=True)
        for (form, ask), person, town, pair in zip(forms, people, towns, pairs)
    ]


def _found(answer: str, generated: str, free: bool) -> bool:
    if free:
        return f" {normalise(answer)} " in f" {normalise(generated)} "
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", generated) is not None
