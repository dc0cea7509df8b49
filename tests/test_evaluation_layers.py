"""Errors are found in the layer that makes them, and there only."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from forgeattention import CodecSpec
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.tools.evaluation.layers import attention_errors
from tests import tiny


class Halved(DynamicLayer):
    """Gives back values of half their size: attention puts out half of what it should."""

    def update(self, keys, values, *args, **kwargs):
        k, v = super().update(keys, values, *args, **kwargs)
        return k, 0.5 * v


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (2, 60), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_the_layer_that_errs_is_named(ids, wrong):
    model = tiny.llama(num_hidden_layers=3)

    def make():
        cache = DynamicCache(config=model.config)
        cache.layers = [Halved() if i == wrong else DynamicLayer() for i in range(3)]
        return cache

    errors = attention_errors(model, ids, make, block=16)
    assert [error.layer for error in errors] == [0, 1, 2]
    for error in errors:
        assert error.error == pytest.approx(0.5 if error.layer == wrong else 0, abs=1e-12)


def test_the_exact_cache_has_none_and_hooks_are_gone(ids):
    model = tiny.llama()
    errors = attention_errors(model, ids, lambda: DynamicCache(config=model.config), start=0)
    assert all(error.error == 0 for error in errors)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_more_bits_err_less():
    model = tiny.llama(head_dim=64, hidden_size=64).float()
    ids = torch.randint(0, 256, (1, 600), generator=torch.Generator().manual_seed(2))
    coarse, fine = (
        attention_errors(
            model, ids, lambda bits=bits: ForgeCache(model, CodecSpec(k_bits=bits, v_bits=bits)), implementation="forge"
        )
        for bits in (2, 4)
    )
    assert all(0 < b.error < a.error < 1 for a, b in zip(coarse, fine))


def test_positions_must_be_there(ids):
    model = tiny.llama()
    for start in (-1, 60):
        with pytest.raises(ValueError, match=r"^\[layers\] expected 0 <= start < 60; got"):
            attention_errors(model, ids, lambda: DynamicCache(config=model.config), start=start)
    with pytest.raises(ValueError, match=r"^\[layers\] expected attention blocks"):
        attention_errors(torch.nn.Linear(2, 2), ids, lambda: None)
