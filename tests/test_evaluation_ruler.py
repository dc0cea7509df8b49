"""RULER's questions hold their answers, fill the length, are the same for a seed; the score is the published one."""

import random
import re
from argparse import Namespace
from collections import Counter
from types import SimpleNamespace

import pytest
from transformers import DynamicCache

from forgeattention.codec import CodecSpec
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.tools.evaluation import commands_synthetic, ruler
from tests import tiny

LENGTH = 12000


def sample(task, length=LENGTH, seed=0):
    return ruler.make(task, tiny.tokenizer(), length, seed)


def test_there_are_thirteen():
    assert len(ruler.TASKS) == 13


@pytest.mark.parametrize("task", ruler.TASKS)
def test_questions_fill_the_length_and_hold_their_answers(task):
    made = sample(task, 40000)
    assert 0.8 * 40000 < made.tokens + made.max_new_tokens <= 40000
    assert len(made.answers) == {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}.get(task, 1)
    assert len(set(made.answers)) == len(made.answers)
    for answer in made.answers:
        assert answer in made.text
        assert answer not in made.prefix
    assert made == sample(task, 40000)
    assert made.text != sample(task, 40000, seed=1).text
    assert made.answers != sample(task, 40000, seed=1).answers


def test_needles_are_where_the_question_says():
    made = sample("niah_multivalue")
    found = re.findall(r"special magic numbers of (\S+) is: (\d{7})\.", made.text)
    assert [value for _, value in found]
    assert {value for _, value in found} == set(made.answers)
    assert len({key for key, _ in found}) == 1
    made = sample("niah_multikey_1")
    found = dict(re.findall(r"special magic numbers of (\S+) is: (\d{7})\.", made.text))
    asked = re.search(r"numbers of (\S+) in the text above", made.text)[1]
    assert len(found) == 4
    assert found[asked] == made.answers[0]


def test_keys_that_are_not_asked_for_have_other_names():
    made = sample("niah_multikey_3")
    found = re.findall(r"special magic uuids of (\S+) is: (\S+)\.", made.text)
    asked = re.search(r"uuids of (\S+) in the text above", made.text)[1]
    assert len(found) > 20
    assert [value for key, value in found if key == asked] == list(made.answers)


def test_variables_are_those_that_an_interpreter_finds():
    made = sample("vt")
    text = made.text.rpartition("Follow the assignments")[2]
    value = re.search(r"hold the value (\d+)", made.prefix)[1]
    held = {}
    for name, other, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))\.", text):
        held[name] = number or held[other]
    assert {name for name, number in held.items() if number == value} == set(made.answers)


def test_words_are_the_most_frequent():
    made = sample("cwe")
    words = re.findall(r"\d+\. (\w+)", made.text.rpartition("Below is a numbered list")[2])
    assert {word for word, _ in Counter(words).most_common(10)} == set(made.answers)
    made = sample("fwe")
    counts = Counter(word for word in made.text.split("\n")[1].split() if word != "...")
    (first, a), (second, b), (third, c), (_, d) = counts.most_common(4)
    assert (first, second, third) == made.answers
    assert a > b > c > d


def test_two_hops_lead_to_the_answer():
    made = sample("qa_2")
    person = re.search(r"on which ([\w ]+) served\?", made.text)[1]
    ship = re.search(rf"{person} was born in \w+ and served as a mate on the ([\w ]+)\.", made.text)[1]
    gift = re.search(rf"The {ship} was built.*?was given a ([\w ]+), which", made.text)[1]
    assert made.answers == (gift,)
    assert made.text.count(gift) == 1


def test_the_score_is_the_mean_recall_in_any_case():
    assert ruler.score("vt", ["ABC, def"], [["abc", "DEF"]]) == 100
    assert ruler.score("vt", ["abc"], [["abc", "def"]]) == 50
    assert ruler.score("cwe", ["abc", ""], [["abc", "def"], ["x"]]) == 25
    assert ruler.score("qa_1", ["it was def"], [["abc", "def"]]) == 100
    assert ruler.score("qa_1", ["neither", "abc"], [["abc", "def"]] * 2) == 50


def test_scores_need_answers():
    for said, answers in (([], []), (["a"], []), (["a"], [[]])):
        with pytest.raises(ValueError, match=r"^\[ruler\] expected answers for each of"):
            ruler.score("vt", said, answers)


def test_the_prompt_is_no_answer():
    """A random model that was shown every answer scores nothing: only what it generates is looked at."""
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    made = ruler.make("niah_multivalue", tokenizer, 1500)
    said = ruler.answer(model, tokenizer, made, DynamicCache(config=model.config))
    assert len(tokenizer(said)["input_ids"]) <= 2 * made.max_new_tokens
    assert ruler.score("niah_multivalue", [said], [made.answers]) == 0
    assert ruler.score("niah_multivalue", [made.text], [made.answers]) == 100


def test_unknown_tasks_and_lengths_without_room():
    with pytest.raises(ValueError, match=r"^\[ruler\] expected a task in"):
        ruler.check("niah")
    with pytest.raises(ValueError, match=r"^\[ruler\] expected a length of at least"):
        sample("qa_1", 300)


@pytest.mark.parametrize("task", ruler.TASKS)
def test_every_size_can_be_drawn(task):
    sizes = [len(ruler.TASKS[task](random.Random(1), size).text) for size in (1, 10, 100)]
    assert sizes == sorted(sizes)


def test_the_command_leaves_out_tasks_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.llama(head_dim=64).float(), tiny.tokenizer()
    stock = SimpleNamespace(
        model=model, tokenizer=tokenizer, bits=3.0, spec=CodecSpec(),
        make_exact=lambda: DynamicCache(config=model.config), make_packed=lambda: ForgeCache(model.config),
    )  # fmt: skip
    monkeypatch.setattr(commands_synthetic, "setup", lambda _: stock)
    args = Namespace(tasks=None, lengths=[700, 1000], samples=1, seed=0, block=512, model="tiny")
    got = commands_synthetic.run_ruler(args)
    left = {(x["task"], x["length"]) for x in got["left_out"]}
    assert left == {(t, n) for t in ruler.TASKS for n in (700, 1000) if ruler.least_length(t, tokenizer) > n}
    assert {(x["task"], x["length"]) for x in got["rows"]} == {(t, n) for t in ruler.TASKS for n in (700, 1000)} - left
    assert left
    assert got["rows"]
    args.tasks = ["cwe"]
    with pytest.raises(ValueError, match=r"^\[ruler\] expected a length of at least \d+ tokens for cwe"):
        commands_synthetic.run_ruler(args)
    args.tasks, args.lengths = None, [10]
    with pytest.raises(ValueError, match=r"^\[ruler\] expected a length of at least"):
        commands_synthetic.run_ruler(args)
