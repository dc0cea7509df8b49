"""Bytes are counted from what is allocated, each storage once."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from forgeattention.tools.evaluation import memory
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


PEAK = """
import numpy as np
from forgeattention.tools.evaluation import memory

size = 200 << 20
before = memory.peak_rss()
block = np.ones(size, np.uint8)
held = memory.peak_rss()
assert held - before > 0.9 * size, (before, held)
del block
assert memory.peak_rss() - before > 0.9 * size
try:
    memory.reset_peak_rss()
except OSError as error:
    print(error)
else:
    assert memory.peak_rss() < held - 0.9 * size
    print("reset")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_peak_follows_what_is_held():
    """In a process of its own: the peak of this one may be above what is held by more than the block."""
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "reset" or run.stdout.startswith("[reset_peak_rss] expected a peak near")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_a_kernel_that_ignores_the_reset_is_told(monkeypatch):
    monkeypatch.setattr(memory, "_status", {"VmHWM": 900 << 20, "VmRSS": 100 << 20}.get)
    with pytest.raises(OSError, match=r"^\[reset_peak_rss\] expected a peak near 104857600 bytes; got 943718400"):
        memory.reset_peak_rss()
