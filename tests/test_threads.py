"""The CPU kernels' threads: PyTorch's where it is loaded, the module's own elsewhere; results depend on neither."""

import subprocess
import sys

import pytest

COMMON = """
import os, sys, threading
import numpy as np
from forgeattention import ops
from forgeattention.backends.cpu import native
from forgeattention.codec import PAGE, Codec, CodecSpec

codec = Codec(CodecSpec(), 64, 2)
rng = np.random.default_rng(5)
pages = 40
pool = np.zeros(pages * codec.page_bytes, np.uint8)
offsets = np.arange(pages) * codec.page_bytes
k, v = rng.standard_normal((2, 2, pages * PAGE, 64), np.float32)
q = rng.standard_normal((1, 4, 1, 64), np.float32)

def attend(threads=2):
    ops.set_num_threads(threads)
    return ops.decode_attention(q, codec, table, None, 0.125, causal=False)[0]

def encode():
    pool[:] = 0
    ops.encode(k, v, codec, pool, offsets)
    return pool.copy()

ops.set_num_threads(2)
table = ops.PageTable(pool, offsets[None], np.array([pages * PAGE], np.int32), pages * PAGE)
assert "torch" not in sys.modules and not native.shares_torch_threads()
bits, alone = encode(), attend()
"""
TORCH = """
import torch
torch.set_num_threads(2)
shared = native.shares_torch_threads()
assert shared == sys.platform.startswith("linux"), shared
"""
CASES = {
    "torch's threads": TORCH
    + """
assert (encode() == bits).all()
for threads in (1, 2, 3, 8):
    torch.ones(300, 300) @ torch.ones(300, 300)
    assert (attend(threads) == alone).all(), threads
""",
    "a forked child": TORCH
    + """
assert (attend() == alone).all()
child = os.fork()
if child == 0:
    os._exit(0 if not native.shares_torch_threads() and (attend() == alone).all() else 1)
assert os.waitpid(child, 0)[1] == 0
assert (attend() == alone).all() and native.shares_torch_threads()
""",
    "calls from several threads": TORCH
    + """
found = []
def many():
    for _ in range(50):
        found.append((ops.decode_attention(q, codec, table, None, 0.125, causal=False)[0] == alone).all())
callers = [threading.Thread(target=many) for _ in range(3)]
[c.start() for c in callers]
[c.join() for c in callers]
assert len(found) == 150 and all(found)
""",
}


@pytest.mark.parametrize("name", CASES)
def test_threads(name):
    run = subprocess.run([sys.executable, "-c", COMMON + CASES[name]], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
