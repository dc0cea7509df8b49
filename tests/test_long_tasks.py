"""The benchmarks of long contexts and long answers: what is asked, how batches are told apart, what is summed up."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import candidates
import journal
import long_decode
import long_tasks

from forgeattention.tools.evaluation import needles


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(head_dim=64, num_hidden_layers=2, hidden_size=128, initializer_range=0.15).float()


def test_needles_and_samples_are_asked_and_judged(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_tasks, "_tokenizer", tiny.tokenizer(), raising=False)
    (question,) = long_tasks._needles(("multi", 600))
    assert len(question.prompts) == len(question.answers) == 5
    asked: list[Any] = []

    def answers(_: Any, prompts: Any, candidate: Any, count: int, shared: Any) -> tuple[list[list[int]], bool]:
        asked.append((prompts, shared))
        texts = [f"It is {hidden.answer}" for hidden in question.answers[:4]] + [question.answers[0].answer]
        return [list(text.encode()) for text in texts], True

    tokenizer = type("T", (), {"decode": staticmethod(lambda ids, skip_special_tokens: bytes(ids).decode())})
    monkeypatch.setattr(long_tasks.batch_decode, "answers_anyway", answers)
    row = long_tasks.ask(model, tokenizer, question, candidates.EXACT)
    assert (row["passed"], row["of"], row["task"], row["length"]) == (4, 5, "multi", 600)
    prompts, shared = asked[0]
    for rest, whole in zip(prompts, question.prompts, strict=True):
        assert torch.cat([shared, rest]).tolist() == whole
    # What they share ends where the questions part, at the place asked for.
    assert len(shared) > 600
    assert isinstance(question.answers[0], needles.Needle)
    made = long_tasks._ruler(("niah_single_1", 1500, 3))
    assert made is not None
    assert len(made[0]) + made[2] <= 1500
    assert long_tasks._ruler(("cwe", 64, 0)) is None


def test_rows_of_one_test_are_added_up() -> None:
    base = {"cache": "a", "bits": 3.0, "length": 10, "seconds": 1.0, "answers": ["x"]}
    rows = [base | {"task": "multi", "of": 5, "passed": 4}, base | {"task": "multi", "of": 5, "passed": 5}]
    rows.append(base | {"task": "vt", "of": 2, "score": 50.0})
    multi, vt = long_tasks.summary(rows)
    assert (multi["passed"], multi["of"], vt["score"]) == (9, 10, 50.0)
    assert "answers" not in multi | vt


def test_long_answers_are_measured(model: Any) -> None:
    assert long_decode.first_other([1, 2, 3], [1, 2, 4]) == 2
    assert long_decode.first_other([1, 2], [1, 2]) == 2
    assert long_decode.repetition([1, 2, 3, 4] * 8) == pytest.approx(1 - 4 / 29)
    assert long_decode.repetition(list(range(32))) == 0.0
    torch.manual_seed(0)
    prompts = [torch.randint(0, 256, (n,)) for n in (220, 230)]
    exact = long_decode.measure(model, prompts, candidates.EXACT, 40, None)
    assert exact["agreement"] == 1.0
    coded = next(c for c in candidates.candidates(model, "field") if c.name.startswith("KIVI 2"))
    other = long_decode.measure(model, prompts, coded, 40, exact["answers"])
    assert other["agreement"] < 1.0
    # What the exact model answers greedily is at every place its likeliest token; the others are not all.
    ids = torch.cat([prompts[0], torch.tensor(exact["answers"][0])])[None]
    with torch.no_grad():
        best = model(ids).logits[0, 219:-1].log_softmax(-1).max(-1)[0].mean()
    assert long_decode.likelihood(model, prompts[0], exact["answers"][0]) == pytest.approx(float(best), abs=1e-4)


def test_a_journal_goes_on_after_a_cut(tmp_path: Path) -> None:
    file = tmp_path / "new" / "j.jsonl"
    journal.Journal(file).add("a", {"x": 1})
    with file.open("a") as out:
        out.write('["b", {"x"')
    again = journal.Journal(file)
    assert again.get("a") == {"x": 1}
    assert again.get("b") is None
    again.add("c", 3)
    assert journal.Journal(file).known == {"a": {"x": 1}, "c": 3}
