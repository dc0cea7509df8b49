"""Needles of every kind, distractors and free answers: cheats do not pass, and documents hold what is asked."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from forgeattention.tools.evaluation import commands, needles, niah
from forgeattention.tools.evaluation.haystacks import Document, scatter
from forgeattention.tools.evaluation.needles import Fact, Needle, Outcome
from tests import tiny

LINES = "".join(f"row {i} of many\n" for i in range(200))
PROSE = " ".join(f"The {word} walked home." for word in ("baker", "smith", "miller", "weaver", "potter", "cooper") * 9)


class Scripted:
    """A model that reads everything and says what `say(what it read)` gives."""

    device = torch.device("cpu")
    config = SimpleNamespace(_attn_implementation="sdpa")
    generation_config = SimpleNamespace(eos_token_id=256)

    def __init__(self, tokenizer, say):
        self.tokenizer, self.say = tokenizer, say

    def __call__(self, ids, past_key_values, use_cache, logits_to_keep):
        tape = past_key_values
        tape.read += ids[0].tolist()
        if ids.shape[1] > 1:
            shown = self.tokenizer.decode(tape.read).rpartition(">")[0]
            tape.script, tape.said = [*self.tokenizer(self.say(shown))["input_ids"], 256], 0
        else:
            tape.said += 1
        logits = torch.zeros(1, 1, 257)
        logits[0, 0, tape.script[min(tape.said, len(tape.script) - 1)]] = 1
        return SimpleNamespace(logits=logits)


class Tape:
    nbytes = 0

    def __init__(self):
        self.read = []

    def get_seq_length(self):
        return len(self.read)


def outcomes(document, say, max_new_tokens=400):
    tokenizer = tiny.tokenizer()
    model = Scripted(tokenizer, say)
    return [c.outcome for c in niah.ask(model, tokenizer, document, Tape, block=5000, max_new_tokens=max_new_tokens)]


def documents(test, **options):
    setting = {"lengths": [1200], "depths": (0.2, 0.8), **options}
    return list(niah.documents(test, tiny.tokenizer(), setting.pop("lengths"), **setting))


def honest(shown):
    """Finds the sentence that the question is about, and says the end of it."""
    hay, _, question = shown.rpartition("\n\n")
    owner = re.search(r"code word( of the [\w ]+)? mentioned", question)
    if owner:
        return re.search(rf"code word{owner[1] or ''} is ([A-Z ]+ \d+)\.", hay)[1]
    kind = re.search(r"special magic (number|uuid) of the ([\w ]+) mentioned", question)
    return re.search(rf"special magic {kind[1]} of the {kind[2]} is (\S+)\.", hay)[1] if kind else "no"


@pytest.mark.parametrize("test", ["single", "varied", "multi", "distractors"])
def test_a_model_that_reads_passes_everything(test):
    for document in documents(test):
        assert outcomes(document, honest) == [Outcome.PASS] * len(document.asked)


def test_numbers_and_uuids_are_found_by_a_model_that_reads():
    found = [o for d in documents("kinds")[:4] for o in outcomes(d, honest)]
    assert found == [Outcome.PASS] * 4


@pytest.mark.parametrize("test", niah.TESTS)
@pytest.mark.parametrize(
    "cheat",
    [
        lambda shown: "",
        lambda shown: "The secret code word is mentioned earlier.",
        lambda shown: shown.rpartition("\n\n")[2],
        lambda shown: shown,
        lambda shown: shown[-1000:],
    ],
    ids=["silent", "vague", "repeats the question", "repeats the prompt", "repeats the end"],
)
def test_cheats_pass_nothing(test, cheat):
    for document in documents(test):
        assert Outcome.PASS not in outcomes(document, cheat, max_new_tokens=1500)


@pytest.mark.parametrize("test", ["multi", "distractors", "qa"])
def test_naming_every_candidate_is_confused(test):
    for document in documents(test):
        names = [needle.answer for _, needle in document.asked] + [d for ds in document.decoys for d in ds]
        got = outcomes(document, lambda shown, names=names: "; ".join(dict.fromkeys(names)))
        assert got == [Outcome.CONFUSED] * len(document.asked)


def test_distractors_are_the_next_numbers():
    (document, _) = documents("distractors")
    ((_, needle),) = document.asked
    got = {int(decoy.split()[-1]) - int(needle.number) for decoy in document.decoys[0]}
    assert got == {-2, -1, 1, 2}
    for decoy in document.decoys[0]:
        assert document.text.count(decoy) == 1
        assert outcomes(document, lambda shown, decoy=decoy: decoy) == [Outcome.CONFUSED]


@pytest.mark.parametrize("test", niah.TESTS)
def test_documents_hold_each_needle_once_and_the_haystack_whole(test):
    for document in documents(test):
        rest = document.text
        for _, needle in document.asked:
            assert document.text.count(needle.sentence) == 1
            assert needle.answer in needle.sentence
            assert needle.answer not in needle.question
        for sentence in re.findall(r"The secret code word of the [\w ]+ is [A-Z ]+\d+\.", rest):
            rest = rest.replace(sentence, "")
        for _, needle in document.asked:
            rest = rest.replace(needle.sentence, "")
        assert rest.split() == document.hay.split()


def test_free_answers_ignore_case_articles_and_punctuation():
    fact = Fact("He hid it under the copper kettle.", "Where?", "copper kettle", free=True)
    for said in ("The Copper Kettle.", "under a copper-kettle!", "It is the COPPER  KETTLE, I think"):
        assert needles.judge(said, fact) is Outcome.PASS
    for said in ("copper", "kettle copper", "copper kettles", "a cop per kettle", ""):
        assert needles.judge(said, fact) is Outcome.FAIL
    strict = Fact(fact.sentence, fact.question, fact.answer)
    assert needles.judge("Copper kettle", strict) is Outcome.FAIL
    assert needles.judge("a copper kettle.", strict) is Outcome.PASS


def test_an_answer_inside_recited_text_is_an_echo():
    said = "The baker walked home. The smith walked home. The miller walked home. PURPLE ELEPHANT 7742"
    assert needles.judge(said, Needle(), hay=PROSE) is Outcome.ECHO
    assert needles.judge("The baker walked home. PURPLE ELEPHANT 7742", Needle(), hay=PROSE) is Outcome.PASS


def test_several_needles_keep_their_order_and_stand_between_lines():
    marks = [(0.9, Needle("B", "2222")), (0.1, Needle("A", "1111")), (1, Needle("C", "3333")), (0, Needle("D", "4444"))]
    text = scatter(LINES, marks, lines=True)
    assert [text.index(n.sentence) for _, n in sorted(marks, key=lambda m: m[0])] == sorted(
        text.index(n.sentence) for _, n in marks
    )
    for _, needle in marks:
        assert needle.sentence in text.splitlines()
    with pytest.raises(ValueError, match=r"^\[niah\] expected a haystack without 'row'"):
        scatter(LINES, [(0.5, Needle("row", "17"))], lines=True)


@pytest.mark.parametrize("kind", needles.KINDS)
def test_needles_are_drawn_from_the_seed(kind):
    assert needles.make(kind, 3) == needles.make(kind, 3)
    assert len({needles.make(kind, seed).answer for seed in range(8)}) > 3
    assert needles.make("code", 0) == Needle()


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"^\[niah\] expected a needle of kind"):
        needles.make("tune", 0)
    with pytest.raises(ValueError, match=r"^\[niah\] expected 1 to 7 needles; got 8"):
        needles.several(8)
    with pytest.raises(ValueError, match=r"^\[niah\] expected a test in"):
        documents("double")


def test_questions_go_on_from_copies_of_one_reading():
    """Five questions about one document get the answers that five readings would give."""
    tokenizer, found = tiny.tokenizer(), needles.facts()
    model = tiny.llama(1)
    asked = tuple((i / 5, fact) for i, fact in enumerate(found))
    text = scatter(PROSE, asked)
    document = Document("qa", "own", len(PROSE), text, PROSE, asked, ((),) * 5)
    cells = niah.ask(model, tokenizer, document, lambda: DynamicCache(config=model.config), max_new_tokens=12)
    for cell, (_, fact) in zip(cells, asked):
        ids = niah.prompt(tokenizer, text, fact.question)
        alone = niah.answer(model, tokenizer, ids, DynamicCache(config=model.config), max_new_tokens=12)
        assert cell.reply.text == alone.text
        assert cell.reply.prompt_tokens == ids.shape[1]


def test_the_ramp_ends_at_the_longest_that_fits():
    for room in (1000, 1001, 1500, 3999, 4000, 12345):
        lengths = list(niah.ramp(1000, 10**6, lambda n, room=room: n <= room))
        assert lengths[0] == 1000
        assert lengths == sorted(set(lengths))
        assert lengths[-1] <= room < lengths[-1] * 17 / 16 + 1
    assert list(niah.ramp(1000, 3000, lambda n: True)) == [1000, 2000, 3000]
    with pytest.raises(ValueError, match=r"^\[niah\] expected a first length that fits"):
        list(niah.ramp(1000, 10**6, lambda n: False))


def cell(outcome, depth=0.5):
    return niah.Cell(100, depth, Needle(), outcome, niah.Reply("x", 1, 1, 0.0, 0.0))


def test_kept_counts_what_both_caches_find():
    ok, part, bad = Outcome.PASS, Outcome.PARTIAL_WORD, Outcome.FAIL
    pairs = [(ok, ok), (ok, bad), (ok, part), (bad, ok), (part, part), (bad, bad)]
    result = commands.niah_result([("single", cell(a), cell(b)) for a, b in pairs])
    assert {k: result[k] for k in ("exact_pass", "packed_pass", "kept", "of")} == {
        "exact_pass": 3, "packed_pass": 2, "kept": 1, "of": 6,
    }  # fmt: skip
    assert [(c["exact"], c["packed"]) for c in result["cells"]] == [(str(a), str(b)) for a, b in pairs]
    assert result["tests"]["single"]["kept"] == 1
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        (None, Needle()),
        ("GREEN DOOR 4411", Needle("GREEN DOOR", "4411")),
        ("The secret code word is GREEN DOOR 4411.", Needle("GREEN DOOR", "4411")),
        ("OPEN SESAME", Needle("OPEN SESAME", "")),
    ],
)
def test_needles_of_the_command_line(text, needle):
    assert commands.needle_from(text, None, None) == needle
    assert needle.answer in needle.sentence
    assert needles.judge(needle.answer, needle) is Outcome.PASS
    assert needles.judge("no idea", needle) is Outcome.FAIL


def test_own_sentences_need_their_question_and_answer():
    made = commands.needle_from("The key is under the mat.", "Where is the key?", "under the mat")
    assert made == Fact("The key is under the mat.", "Where is the key?", "under the mat")
    for arguments in (("It is here.", None, None), ("It is here.", "Where?", None), (None, "Where?", "here"),
                      ("It is here.", "Where?", "there"), ("", None, None)):  # fmt: skip
        with pytest.raises(ValueError, match=r"^\[niah\] expected"):
            commands.needle_from(*arguments)
