"""HumanEval's harness: right answers pass, wrong ones do not, and code that a model wrote can do no harm."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import humaneval

PROBLEM = {
    "task_id": "T/0",
    "prompt": 'from typing import List\n\n\ndef double(x: List[int]) -> List[int]:\n    """Twice each."""\n',
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n",
}
RIGHT = "def double(x: List[int]) -> List[int]:\n    return [2 * i for i in x]\n"


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        (RIGHT, True),
        (RIGHT + "```\nHere is how it works", True),
        ("    return [i + i for i in x]\n", True),
        (RIGHT.replace("2 *", "3 *"), False),
        ("def double(x):\n    while True:\n        pass\n", False),
        ("import sys\nsys.exit(0)\n" + RIGHT, False),
        ("def double(x):\n    return [0] * 10**11\n", False),
        ("import socket\nsocket.socket()\n" + RIGHT, False),
        ("import os\nos.system('true')\n" + RIGHT, False),
        ("open('left', 'w')\n" + RIGHT, False),
        ("def double(x\n", False),
    ],
    ids=["right", "text behind", "body alone", "wrong", "endless", "leaves", "memory", "network", "shell", "file",
         "syntax"],
)  # fmt: skip
def test_answers_are_run_and_judged(answer: str, good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(humaneval, "SECONDS", 2)
    assert humaneval.judge([PROBLEM], [answer], 1) == [good]


def test_prompts_share_what_stands_in_front() -> None:
    rows = [torch.tensor([1, 2, 3, 4, 5]), torch.tensor([1, 2, 3, 9]), torch.tensor([1, 2, 3, 4, 7, 8])]
    assert humaneval.shared_tokens(rows) == 3
    assert humaneval.shared_tokens([torch.tensor([1, 2]), torch.tensor([1, 2])]) == 1
