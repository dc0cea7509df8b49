"""Context parallelism over two and three processes on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from serving_engine import model
from tolerances import MERGE_DOUBLE

from forgeattention.cache.sharded import merge_parts

HERE = Path(__file__).parent


def spread(ranks: int, *command: str) -> str:
    """Output of a program started by torchrun on loopback."""
    path = os.pathsep.join([str(HERE), *sys.path])
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    full = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command]
    done = subprocess.run(full, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_give_what_one_process_gives(ranks):
    assert spread(ranks, str(HERE / "parallel_ranks.py")).count("rank done") == ranks


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_lost_rank_ends_the_others(how):
    """Without torchrun, which would end rank 0 itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(port), "WORLD_SIZE": "2", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, str(HERE / "parallel_ranks.py"), "--losing", how]
    ranks = [
        subprocess.Popen(command, env=env | {"RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        said, errors = ranks[0].communicate(timeout=120)
        assert (ranks[0].returncode, said) == (0, "rank done\n"), errors[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[1].returncode == -signal.SIGKILL


def test_parts_merge_to_the_whole():
    rng = np.random.default_rng(0)
    scores, v = rng.standard_normal((5, 40)) * 3, rng.standard_normal((40, 8))
    parts = []
    for at in (slice(0, 7), slice(7, 7), slice(7, 40)):
        s = scores[:, at]
        lse = np.log(np.exp(s).sum(1)) if s.shape[1] else np.full(5, -np.inf)
        w = np.exp(s - np.where(np.isinf(lse), 0, lse)[:, None])
        parts.append((torch.from_numpy(w @ v[at]), torch.from_numpy(lse)))
    o, lse = merge_parts(parts)
    weights = np.exp(scores)
    np.testing.assert_allclose(lse, np.log(weights.sum(1)), rtol=MERGE_DOUBLE)
    np.testing.assert_allclose(o, weights @ v / weights.sum(1, keepdims=True), rtol=0, atol=MERGE_DOUBLE)


def test_tensor_parallel_of_transformers(tmp_path):
    model().save_pretrained(tmp_path)
    assert spread(2, str(HERE / "parallel_ranks.py"), str(tmp_path)).count("rank done") == 2


def test_ranks_of_an_mlx_ring():
    launch = shutil.which("mlx.launch", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert launch
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [launch, "-n", "2", "--backend", "ring", "--env", f"PYTHONPATH={env['PYTHONPATH']}", "--"]
    command += [sys.executable, HERE / "parallel_mlx.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.count("rank done")) == (0, 2), done.stderr[-3000:]
