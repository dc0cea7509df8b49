"""Bytes are counted from what is allocated, each storage once."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from forgeattention.evaluation import memory
from tests import tiny


def test_exact_cache_bytes():
    model, cache = tiny.llama(), DynamicCache()
    assert memory.cache_bytes(cache) == 0
    model(torch.zeros(3, 50, dtype=torch.long), past_key_values=cache, use_cache=True)
    keys_and_values, layers, rows, heads, head_dim, itemsize = 2, 2, 3, 2, 8, 8
    assert memory.cache_bytes(cache) == keys_and_values * layers * rows * heads * 50 * head_dim * itemsize


def test_a_view_costs_its_storage_once():
    whole = torch.zeros(1000, dtype=torch.float32)
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=whole[:10], values=whole[10:20], states={"a": [whole[5:6]]})])
    assert memory.cache_bytes(cache) == 4000


def test_a_cache_that_counts_itself_is_asked():
    assert memory.cache_bytes(SimpleNamespace(nbytes=123, layers=[])) == 123


def test_something_else_is_refused():
    with pytest.raises(ValueError, match=r"^\[cache_bytes\] expected a cache with nbytes or layers; got int"):
        memory.cache_bytes(7)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_peak_follows_what_is_held():
    size = 200 << 20
    memory.reset_peak_rss()
    before = memory.peak_rss()
    block = np.ones(size, np.uint8)
    held = memory.peak_rss()
    assert held - before > 0.9 * size
    del block
    assert memory.peak_rss() - before > 0.9 * size
    memory.reset_peak_rss()
    assert memory.peak_rss() < held - 0.9 * size
