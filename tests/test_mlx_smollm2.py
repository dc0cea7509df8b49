"""SmolLM2 in mlx-lm, with the same weights and packed cache as in transformers; and mlx-lm's server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import torch  # noqa: E402
from tiny import llama, tokenizer  # noqa: E402
from tolerances import MLX_SMOLLM2, MLX_STOCK  # noqa: E402

from forgeattention import models  # noqa: E402
from forgeattention.codec import CodecSpec  # noqa: E402
from forgeattention.integrations import mlx as forge  # noqa: E402
from forgeattention.integrations.hf.cache import ForgeCache  # noqa: E402

SPEC = CodecSpec(k_bits=4, v_bits=4, sinks=1, window=0)
TEXT = "In the beginning there was a small village by the sea, and in it lived a woman who kept bees. " * 4


def test_smollm2_answers_as_it_does_in_transformers() -> None:
    try:
        models.resolve("smollm2")
    except ValueError as error:
        pytest.skip(str(error))
    stock, _ = models.load("smollm2", attn_implementation="forge")
    made, words = models.load_mlx("smollm2")
    ids = words.encode(TEXT)[:80]
    cache = ForgeCache(stock, SPEC)
    with torch.no_grad():
        want = [stock(torch.tensor([ids[:72]]), past_key_values=cache).logits[0, -1]]
        want += [stock(torch.tensor([[i]]), past_key_values=cache).logits[0, -1] for i in ids[72:]]
    assert all(layer.cache.packed_lengths.tolist() == [64] for layer in cache.layers)
    with forge.patched():
        packed = forge.make_prompt_cache(made, SPEC)
        found = [made(mx.array([ids[:72]]), cache=packed)[0, -1]]
        found += [made(mx.array([[i]]), cache=packed)[0, -1] for i in ids[72:]]
    assert all(layer.cache.packed_lengths.tolist() == [64] for layer in packed)
    # both fitted to the same weights
    codecs = [[layer.cache.codec.fingerprint for layer in layers] for layers in (packed, cache.layers)]
    assert codecs[0] == codecs[1]
    assert len(set(codecs[0])) > 1
    ours, theirs = np.stack([np.array(x) for x in found]), torch.stack(want).numpy()
    # the prompt's last token saw exact tokens only
    assert np.abs(ours[0] - theirs[0]).max() < MLX_STOCK * np.abs(theirs).max()
    assert (ours.argmax(1) == theirs.argmax(1)).all()
    assert np.abs(ours - theirs).max() < MLX_SMOLLM2 * np.abs(theirs).max()


SERVER = """
import sys
from forgeattention.tools import cli
from forgeattention.integrations.mlx import PackedKVCache

update = PackedKVCache.update_and_fetch
def counted(self, keys, values):
    print(f"batched {self.batched}", file=sys.stderr, flush=True)
    return update(self, keys, values)
PackedKVCache.update_and_fetch = counted
sys.exit(cli.main(["serve", "mlx", "--model", sys.argv[1], "--port", sys.argv[2]]))
"""


def test_the_server_answers_from_packed_caches_and_batches(tmp_path: Path) -> None:
    model = llama(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64, initializer_range=0.1)
    model.float().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-c", SERVER, str(tmp_path), str(port)], stderr=log, env=env)
    try:
        prompts = ["a" * 250, "b" * 90, "c" * 300]
        wait_for(port, server)
        alone = [complete(port, prompt) for prompt in prompts]
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(lambda prompt: complete(port, prompt), prompts))
        assert together == alone
        assert all(len(text) > 0 for text in alone)
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
    assert set(re.findall(r"batched (True|False)", (tmp_path / "log").read_text())) == {"True"}


def complete(port: int, prompt: str) -> str:
    body = json.dumps({"prompt": prompt, "max_tokens": 12, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found["choices"][0]["text"]


def wait_for(port: int, server: Any) -> None:
    for _ in range(120):
        assert server.poll() is None
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError("the server did not start within a minute")
