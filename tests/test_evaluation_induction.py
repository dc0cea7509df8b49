"""The constructed model recalls everything from a cache that holds everything, and nothing that a cache lost."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from forgeattention import CodecSpec
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.tools.evaluation import induction

PAIRS = 8


class Recent(DynamicLayer):
    """Keeps the last 256 tokens."""

    def update(self, keys, values, *args, **kwargs):
        k, v = super().update(keys, values, *args, **kwargs)
        n = keys.shape[2]
        self.keys, self.values = self.keys[:, :, -256:], self.values[:, :, -256:]
        return k[:, :, -256 - n :], v[:, :, -256 - n :]

    def get_mask_sizes(self, query_length):
        held = 0 if self.keys is None or self.keys.numel() == 0 else self.keys.shape[2]
        return held + query_length, 0


@pytest.fixture(scope="module", params=[64, 128])
def model(request):
    return induction.build(request.param, 1024, twin=0.8)


def test_the_exact_cache_recalls_everything(model):
    task = induction.task(1500, PAIRS, 1024, twins=True)
    got = induction.recall(model, task, lambda: DynamicCache(config=model.config), block=512)
    assert all(got.hits)
    # All of the attention goes where it should: the value's code comes back whole, its twin's cosine below it.
    assert got.margins == pytest.approx([0.2] * PAIRS, abs=0.02)


@pytest.mark.parametrize("spec", [CodecSpec(), CodecSpec(k_bits=2, v_bits=2), CodecSpec(sinks=0, window=64)])
def test_packed_caches_recall_everything(model, spec):
    task = induction.task(2048, PAIRS, 1024, twins=True, seed=1)
    got = induction.recall(model, task, lambda: ForgeCache(model.config, spec), implementation="forge", block=512)
    assert all(got.hits)
    assert got.cache_bytes < 0.45 * 2 * 4 * 2048 * 2 * induction.KV_HEADS * model.config.head_dim


def test_a_cache_that_forgets_is_caught(model):
    task = induction.task(1500, PAIRS, 1024)

    def forgetful():
        cache = DynamicCache(config=model.config)
        cache.layers = [Recent() for _ in cache.layers]
        return cache

    got = induction.recall(model, task, forgetful, block=128)
    assert got.hits[-1]
    assert not any(hit for hit, depth in zip(got.hits, got.depths) if depth < 0.8)


def test_a_cache_that_blurs_keys_is_caught(model):
    class Blurred(DynamicLayer):
        def update(self, keys, values, *args, **kwargs):
            noise = torch.randn(keys.shape, generator=torch.Generator().manual_seed(keys.shape[2]))
            return super().update(keys + 0.6 * noise, values, *args, **kwargs)

    def blurred():
        cache = DynamicCache(config=model.config)
        cache.layers = [DynamicLayer(), Blurred()]
        return cache

    task = induction.task(1500, PAIRS, 1024, twins=True)
    assert sum(induction.recall(model, task, blurred, block=512).hits) < PAIRS / 2


@pytest.mark.parametrize("twins", [False, True])
def test_keys_stand_once_and_their_values_follow(twins):
    task = induction.task(1000, PAIRS, 512, twins=twins, seed=3)
    assert task.ids[task.places].equal(task.keys)
    assert task.ids[task.places + 1].equal(task.values)
    assert torch.cat([task.keys, task.values]).unique().numel() == 2 * PAIRS
    for key in task.keys:
        assert (task.ids == key).sum() == 1
        assert (task.ids == key + 1).sum() == int(twins)
    assert task.places[0] == 1
    assert task.places[-1] > 1000 * (1 - 1 / PAIRS)


def test_the_same_seed_gives_the_same_model_and_task():
    a, b, c = (induction.build(64, 64, seed=seed).lm_head.weight for seed in (0, 0, 1))
    assert a.equal(b)
    assert not a.equal(c)
    assert induction.task(300, 4, 64, seed=5).ids.equal(induction.task(300, 4, 64, seed=5).ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_tell_the_last_token_from_every_other_up_to_a_million(dtype):
    """Score of layer 0 by distance: alone at its top at distance one, far below for all others together."""
    f = induction.build(64, 64, dtype=dtype).model.rotary_emb.inv_freq.double()
    distance = torch.arange(2**20, dtype=torch.float64)
    score = torch.cat([torch.cos(f * (part[:, None] - 1)).mean(-1) for part in distance.split(2**16)])
    assert int(score.argmax()) == 1
    others = torch.cat([score[:1], score[2:]])
    assert float((induction.SHARPNESS[0] * (others - 1)).exp().sum()) < 1e-2


@pytest.mark.parametrize(("length", "pairs", "vocabulary"), [(63, 8, 1024), (1000, 8, 63), (1000, 0, 1024)])
def test_no_room_for_the_pairs(length, pairs, vocabulary):
    with pytest.raises(ValueError, match=r"^\[induction\] expected length and vocabulary >="):
        induction.task(length, pairs, vocabulary)


def test_models_that_cannot_be_built():
    with pytest.raises(ValueError, match=r"^\[induction\] expected an even head_dim"):
        induction.build(63)
    with pytest.raises(ValueError, match=r"^\[induction\] expected a cosine between"):
        induction.build(64, 64, twin=1.0)
