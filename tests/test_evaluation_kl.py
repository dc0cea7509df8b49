"""KL, same top token and perplexity against a direct computation, and against caches that cheat."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from forgeattention.tools.evaluation import kl
from forgeattention.tools.evaluation.streaming import attention, spans
from tests import tiny


class Shaken(DynamicLayer):
    """A cache layer that adds a fixed error to the keys."""

    def update(self, keys, values, *args, **kwargs):
        return super().update(keys + 0.3 * torch.sin(100 * keys), values, *args, **kwargs)


class Forgetful(DynamicLayer):
    """A cache layer that gives back nothing but the block that was just put in."""

    def update(self, keys, values, *args, **kwargs):
        super().update(keys, values, *args, **kwargs)
        return keys, values

    def get_mask_sizes(self, query_length):
        return query_length, 0


def cache_of(model, layer):
    cache = DynamicCache(config=model.config)
    cache.layers = [layer() for _ in range(model.config.num_hidden_layers)]
    return cache


@pytest.fixture(scope="module")
def model():
    return tiny.llama()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (2, 90), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("block", [1, 32, 90])
def test_the_exact_cache_against_itself_is_zero(model, ids, block):
    result = kl.compare(model, ids, lambda: DynamicCache(config=model.config), block=block)
    assert result.kl == 0
    assert result.same_top == 1
    assert result.positions == 2 * 45
    logits = model(ids).logits[:, 45:-1]
    want = functional.cross_entropy(logits.flatten(0, 1), ids[:, 46:].flatten()).exp().item()
    assert result.perplexity == result.exact_perplexity == pytest.approx(want)


@pytest.mark.parametrize("block", [1, 32, 90])
@pytest.mark.parametrize("start", [0, 17, 88])
def test_a_changed_cache_gives_the_divergence_computed_directly(model, ids, block, start):
    result = kl.compare(model, ids, lambda: cache_of(model, Shaken), block=block, start=start)
    p = model(ids).logits[:, start:].log_softmax(-1)
    q = model(ids, past_key_values=cache_of(model, Shaken), use_cache=True).logits[:, start:].log_softmax(-1)
    divergence = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert divergence.mean() > 0.01
    assert result.kl == pytest.approx(divergence.mean().item())
    assert result.same_top == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    nll = functional.nll_loss(q[:, :-1].flatten(0, 1), ids[:, start + 1 :].flatten()).item()
    assert result.perplexity == pytest.approx(math.exp(nll))
    assert result.positions == 2 * (90 - start)


def test_parts_are_the_means_of_their_positions(model, ids):
    whole = kl.compare(model, ids, lambda: cache_of(model, Shaken), start=20, parts=1)
    parts = kl.compare(model, ids, lambda: cache_of(model, Shaken), start=20, parts=3).parts
    assert [(part.start, part.stop) for part in parts] == [(20, 43), (43, 66), (66, 90)]
    assert [(part.start, part.stop) for part in whole.parts] == [(20, 90)]
    for part in parts:
        p = model(ids).logits.log_softmax(-1)[:, part.start : part.stop]
        q = model(ids, past_key_values=cache_of(model, Shaken), use_cache=True).logits.log_softmax(-1)
        q = q[:, part.start : part.stop]
        want = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item()
        assert part.kl == pytest.approx(want)
        target = ids[:, part.start + 1 : part.stop + 1]
        nll = functional.nll_loss(q[:, : target.shape[1]].flatten(0, 1), target.flatten()).item()
        assert part.perplexity == pytest.approx(math.exp(nll))
    assert whole.kl == pytest.approx(sum(part.kl * (part.stop - part.start) for part in parts) / 70)
    for wrong in (0, 70):
        with pytest.raises(ValueError, match=r"^\[kl\] expected 1 <= parts <= 69 measured positions; got"):
            kl.compare(model, ids, lambda: cache_of(model, Shaken), start=20, parts=wrong)


def test_damage_that_grows_with_the_context_is_seen(model, ids):
    class Late(DynamicLayer):
        def update(self, keys, values, *args, **kwargs):
            wrong = keys + torch.randn(keys.shape, dtype=keys.dtype, generator=torch.Generator().manual_seed(0))
            return super().update(wrong if self.get_seq_length() >= 60 else keys, values, *args, **kwargs)

    parts = kl.compare(model, ids, lambda: cache_of(model, Late), start=0, parts=3, block=10).parts
    assert parts[0].kl == parts[1].kl == 0
    assert parts[2].kl > 0.01


def test_a_cache_that_forgets_is_seen(model, ids):
    kept = kl.compare(model, ids, lambda: cache_of(model, Forgetful), block=90)
    lost = kl.compare(model, ids, lambda: cache_of(model, Forgetful), block=10)
    assert kept.kl == 0
    assert lost.kl > 0.1
    assert lost.same_top < 1


def test_a_used_cache_is_refused(model, ids):
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match=r"^\[kl\] expected make_cache to make an empty cache; got one of 90 tokens"):
        kl.compare(model, ids, lambda: cache)


def test_predictions_that_are_no_numbers_are_refused(model, ids):
    class Broken(DynamicLayer):
        def update(self, keys, values, *args, **kwargs):
            return super().update(keys, values * float("nan"), *args, **kwargs)

    with pytest.raises(ValueError, match=r"^\[kl\] expected finite predictions; got NaN or inf"):
        kl.compare(model, ids, lambda: cache_of(model, Broken))


@pytest.mark.parametrize("start", [-1, 89, 90])
def test_start_must_leave_a_prediction(model, ids, start):
    with pytest.raises(ValueError, match=r"^\[kl\] expected 0 <= start < tokens - 1 = 89; got"):
        kl.compare(model, ids, lambda: DynamicCache(config=model.config), start=start)


def test_windows_cut_the_text_in_order():
    assert kl.windows(torch.arange(10), 4, 2).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for length, count in ((4, 3), (1, 2), (4, 0)):
        with pytest.raises(ValueError, match=r"^\[kl\] expected length >= 2 and count >= 1"):
            kl.windows(torch.arange(10), length, count)


def test_the_candidate_alone_runs_with_its_implementation(model, ids):
    seen = []

    class Watching(DynamicLayer):
        def update(self, *args, **kwargs):
            seen.append(model.config._attn_implementation)
            return super().update(*args, **kwargs)

    kl.compare(model, ids, lambda: cache_of(model, Watching), implementation="eager")
    assert set(seen) == {"eager"}
    assert model.config._attn_implementation == "sdpa"


def test_attention_is_restored_after_an_error(model):
    def fail():
        assert model.config._attn_implementation == "eager"
        raise KeyError

    with pytest.raises(KeyError), attention(model, "eager"):
        fail()
    assert model.config._attn_implementation == "sdpa"


def test_spans():
    assert spans(7, 3) == [(0, 3), (3, 6), (6, 7)]
    with pytest.raises(ValueError, match=r"^\[streaming\] expected block >= 1; got 0"):
        spans(7, 0)
