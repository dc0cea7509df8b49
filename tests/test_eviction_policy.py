"""Policies: what they give up, and how much."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3_5TextConfig

from forgeattention.eviction import POLICIES, V1, V2, V3, AttentionWindow, Eviction, Recency, attention_fraction
from forgeattention.eviction.policy import Items, effective, excess


def items(n: int, seed: int = 0, size: int = 64) -> Items:
    starts = 4 + size * np.arange(n)
    return Items(starts, np.random.default_rng(seed).standard_normal(n), size, 4 + size * n + 130)


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(sorted(POLICIES)), n=st.integers(0, 60), count=st.integers(0, 70), seed=st.integers(0, 99))
def test_each_item_goes_once_and_no_more_than_asked(name, n, count, seed):
    policy, given_items = POLICIES[name](), items(n, seed)
    gone = policy.choose(given_items, count)
    assert len(set(gone.tolist())) == len(gone) <= min(n, count)
    assert all(0 <= i < n for i in gone.tolist())
    if name != "v3":
        assert len(gone) == min(n, count)
    np.testing.assert_array_equal(gone, POLICIES[name]().choose(given_items, count))


def test_v1_takes_the_lowest_scores_wherever_they_are():
    given_items = items(20)
    assert set(V1().choose(given_items, 5)) == set(np.argsort(given_items.scores)[:5])


@settings(max_examples=50, deadline=None)
@given(per=st.integers(1, 6), part=st.integers(0, 6), seed=st.integers(0, 99))
def test_v2_takes_as_much_from_every_segment(per, part, seed):
    given_items, part = items(8 * per, seed), min(part, per)
    gone = V2().choose(given_items, 8 * part)
    assert np.bincount(gone // per, minlength=8).tolist() == [part] * 8
    for s in range(8):
        own = given_items.scores[s * per : (s + 1) * per]
        assert set(gone[gone // per == s] - s * per) == set(np.argsort(own, kind="stable")[:part])


def test_v2_makes_up_what_rounding_leaves_by_score():
    given_items = items(16)
    gone = V2().choose(given_items, 3)
    assert set(gone) == set(np.argsort(given_items.scores)[:3])


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 40), count=st.integers(0, 50), seed=st.integers(0, 99))
def test_v3_keeps_prefix_and_window(n, count, seed):
    given_items = items(n, seed)
    gone = V3().choose(given_items, count)
    free = (given_items.starts >= 128) & (given_items.starts + 64 <= given_items.length - 128)
    assert free[gone].all()
    assert len(gone) == min(count, free.sum())


def test_recency_and_window_take_the_oldest():
    assert Recency().choose(items(9), 3).tolist() == [0, 1, 2]
    assert AttentionWindow(tokens=500).share(2000) == 0.25
    assert AttentionWindow(tokens=500).share(10) == 1.0


def test_budgets():
    assert excess(1000, 1000, 0.9, 64) == 2
    assert excess(1000, 1000, 1.0, 64) == 0
    assert excess(512, 1024, 0.5, 64) == 0
    assert excess(513, 1024, 0.5, 64) == 1


def test_hybrids_give_up_less():
    """The recipe's examples: Qwen2.5 90 % stays, Qwen3.5 with 16 of 64 layers becomes 97.5 %."""
    assert effective(0.9, 1.0) == pytest.approx(0.9)
    assert effective(0.9, 16 / 64) == pytest.approx(0.975)
    assert attention_fraction(LlamaConfig()) == 1.0
    assert attention_fraction(Qwen3_5TextConfig(num_hidden_layers=64)) == 0.25
    gemma = Gemma3TextConfig(num_hidden_layers=12)
    assert attention_fraction(gemma) == 2 / 12


def test_command_line_forms():
    made = Eviction.parse("v3:0.75:host")
    assert (type(made.policy), made.policy.retention, made.on_evict) == (V3, 0.75, "host")
    assert Eviction.parse("window:300").policy == AttentionWindow(tokens=300)
    assert Eviction.parse("v1:0.5").on_evict == "drop"
    for wrong in ("v3", "v4:0.5", "v3:x", "v3:0.5:tape", "v3:0", "v3:1.5"):
        with pytest.raises(ValueError, match=r"\[eviction\] expected"):
            Eviction.parse(wrong)
