"""What each rank of a context-parallel group does in the tests; run by torchrun."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import distributed

from forgeattention import CodecSpec, ops
from forgeattention.cache import LayerCache, TorchArrays
from forgeattention.cache.sharded import Sharding, merge_parts
from forgeattention.codec import PAGE, Codec
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.ops.table import PageTable


def layers(rank: int, world: int) -> None:
    """One layer: parts merged over ranks are bit for bit the parts merged in one process."""
    codec = Codec(CodecSpec(window=16), 64, 2)
    made = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, 700, 64, generator=made) for _ in range(2))
    whole = LayerCache(codec, 1, TorchArrays(torch.device("cpu")))
    mine = LayerCache(codec, 1, TorchArrays(torch.device("cpu")), sharding=Sharding())
    at = 0
    for n in (1, 99, 300, 7, 1, 200, 92):
        whole.append(k[:, :, at : at + n], v[:, :, at : at + n])
        mine.append(k[:, :, at : at + n], v[:, :, at : at + n])
        at += n
        q = torch.randn(1, 6, 1, 64, generator=made)
        parts = []
        for r in range(world):
            pages = whole.pool.addresses(whole.row_pages(0)[r::world])
            offsets, count = torch.from_numpy(pages)[None], PAGE * len(pages)
            table = PageTable(None, offsets, torch.tensor([count], dtype=torch.int32), count) if count else None
            part = ops.decode_attention(q, codec, table, None if r else whole.exact, 0.1, causal=r == 0)
            parts.append(part)
        want, got = merge_parts(parts), mine.attend(q, 0.1)
        assert torch.equal(want[0], got[0])
        assert torch.equal(want[1], got[1])
        # Two ways of rounding queries and weights to integers; they lie up to 1.6e-5 apart where AVX2 is all there is.
        torch.testing.assert_close(got[0], whole.attend(q, 0.1)[0], rtol=1e-4, atol=2e-5)
        assert mine.lengths.tolist() == whole.lengths.tolist() == [at]
    held = int(whole.packed_lengths[0]) // PAGE
    assert int(mine.packed_lengths[0]) // PAGE == len(range(rank, held, world))
    assert mine.pool.in_use == len(range(rank, held, world))
    for refused in (lambda: mine.select([0, 0]), lambda: mine.fork([0, 0]), lambda: mine.trim(400)):
        with pytest.raises(ValueError, match=r"\[context_parallel\]"):
            refused()


def models() -> None:
    """A model: every rank generates what the model generates alone."""
    from serving_engine import model

    llama = model()
    spec = CodecSpec(window=16, k_code="scalar", refine=False)
    # Not every text will do: this random model's softmax is so sharp that rounding alone moves single positions by 0.1.
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (1, 500)))
    outs = []
    for sharding in (None, Sharding()):
        cache = ForgeCache(llama, spec, sharding=sharding)
        with torch.inference_mode():
            out = [llama(input_ids=ids[:, i : i + 100], past_key_values=cache).logits for i in range(0, 400, 100)]
            out += [llama(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(400, 500)]
        outs.append(torch.cat(out, 1))
    assert float((outs[0] - outs[1]).abs().max() / outs[0].std()) < 0.1


def tensor_parallel(folder: str) -> None:
    """transformers' tensor parallelism: each rank's cache holds its own heads."""
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 300)))
    outs = []
    for plan in (None, "auto"):
        llama = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="forge", tp_plan=plan)
        cache = ForgeCache(llama, CodecSpec(window=16, k_code="scalar", refine=False))
        with torch.inference_mode():
            out = [llama(input_ids=ids[:, i : i + 50], past_key_values=cache).logits for i in range(0, 250, 50)]
            out += [llama(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(250, 300)]
        outs.append(torch.cat(out, 1))
        heads = cache.layers[0].cache.codec.kv_heads
        assert heads == (2 if plan is None else 2 // distributed.get_world_size())
    assert float((outs[0] - outs[1]).abs().max() / outs[0].std()) < 0.1


def losing(how: str) -> None:
    """Rank 1 is killed, or stands still for ever, between two steps: rank 0 is told so in time."""
    codec, made = Codec(CodecSpec(window=16), 64, 2), torch.Generator().manual_seed(0)
    mine = LayerCache(codec, 1, TorchArrays(torch.device("cpu")), sharding=Sharding())
    mine.append(*(torch.randn(1, 2, 300, 64, generator=made) for _ in range(2)))
    q = torch.randn(1, 6, 1, 64, generator=made)
    mine.attend(q, 0.1)
    if distributed.get_rank() == 1:
        os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"\[context_parallel\] expected a part of every one of 2 ranks; rank 0 got"):
        mine.attend(q, 0.1)
    assert time.monotonic() - begun < 4 * TIMEOUT.total_seconds()
    assert mine.lengths.tolist() == [300], "the cache stands"


TIMEOUT = timedelta(seconds=5)
"""Of the process group that loses a rank."""

if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--losing"]:
        distributed.init_process_group("gloo", timeout=TIMEOUT)
        losing(sys.argv[2])
        print("rank done", flush=True)
        os._exit(0)  # ending the group would wait for the other rank
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    if len(sys.argv) > 1:
        tensor_parallel(sys.argv[1])
    else:
        layers(distributed.get_rank(), distributed.get_world_size())
        models()
    print("rank done", flush=True)
    distributed.destroy_process_group()
    sys.exit(0)
