"""Two threads, two forked processes and two processes with one eviction folder at once do what each does alone."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from forgeattention import CodecSpec
from forgeattention.cache import LayerCache, TorchArrays, load, save
from forgeattention.codec import Codec
from forgeattention.eviction import Eviction, Evictor, Recency

CODEC = Codec(CodecSpec(window=64, refine=False), 64, 2)


def made(folder: Path) -> LayerCache:
    setting = Eviction(Recency(0.5), on_evict="disk", interval=64, folder=folder, recall_share=0.02)
    return LayerCache(CODEC, 1, TorchArrays(), eviction=Evictor(setting, None))


def work(folder: Path, seed: int, rounds: int, cache: LayerCache | None = None) -> str:
    """Appends, attends, demotes pages to the folder and recalls them, forks, trims, saves and loads: a digest of all
    that was attended to."""
    random, digest = torch.Generator().manual_seed(seed), hashlib.sha256()
    cache = made(folder) if cache is None else cache
    for i in range(rounds):
        n = int(np.random.default_rng([seed, i]).choice([1, 1, 5, 64, 200]))
        k, v = (torch.randn(1, 2, n, 64, generator=random) for _ in range(2))
        q = torch.randn(1, 4, n, 64, generator=random)
        digest.update(cache.step(3 * q, k, v, 0.125).numpy().tobytes())
        if i % 10 == 9:
            cache = cache.fork()
            cache.trim(min(30, int(cache.lengths[0])))
        if i % 25 == 24:
            path = folder / f"saved-{seed}-{os.getpid()}"
            save(path, {0: cache}, "m")
            loaded, _ = load(path, {0: CODEC}, "m", TorchArrays())
            q1 = torch.randn(1, 4, 1, 64, generator=random)
            out = [x.attend(q1, 0.125)[0].numpy() for x in (cache, loaded[0])]
            assert np.array_equal(*out)
        if int(cache.lengths[0]) > 6000:
            cache = made(folder)
    return digest.hexdigest()


def started(calls: list[Callable[[], str]]) -> list[tuple[int, int]]:
    """Calls in forked processes, all at once: their ids and where their results come from."""
    children = []
    for call in calls:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(write, call().encode())
            finally:
                os._exit(0)
        os.close(write)
        children.append((child, read))
    return children


def result_of(child: int, read: int) -> str:
    with os.fdopen(read) as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    return found


def rounds_of(number: Callable[[str], int]) -> int:
    return max(30, number("cases") // 20)


def test_two_threads(tmp_path: Path, number: Callable[[str], int], counts: Counter[str]) -> None:
    rounds = rounds_of(number)
    alone = [work(tmp_path, seed, rounds) for seed in (1, 2)]
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.__setitem__(seed, work(tmp_path, seed, rounds)))
        for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(1), found.get(2)] == alone
    counts["steps"] = 2 * rounds


def test_two_forked_processes(tmp_path: Path, number: Callable[[str], int], counts: Counter[str]) -> None:
    """Both go on from a cache that the parent filled, whose demoted pages lie in one file; so does the parent."""
    rounds = rounds_of(number)

    def filled() -> LayerCache:
        cache, random = made(tmp_path), torch.Generator().manual_seed(9)
        for _ in range(12):
            k, v = (torch.randn(1, 2, 100, 64, generator=random) for _ in range(2))
            cache.append(k, v)
        assert sum(cache.eviction.demoted)
        return cache

    alone = [work(tmp_path, seed, rounds, filled()) for seed in (1, 2, 3)]
    shared: Any = filled()
    children = started([lambda seed=seed: work(tmp_path, seed, rounds, shared) for seed in (1, 2)])
    mine = work(tmp_path, 3, rounds, shared)
    got = [result_of(*child) for child in children]
    assert [*got, mine] == alone
    counts["steps"] = 3 * rounds


def test_two_processes_with_one_folder(tmp_path: Path, number: Callable[[str], int], counts: Counter[str]) -> None:
    rounds = rounds_of(number)
    alone = [work(tmp_path, seed, rounds) for seed in (1, 2)]
    program = (
        "import sys, pathlib; sys.path[:0] = sys.argv[4:]; import test_processes; "
        "print(test_processes.work(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))"
    )
    here = Path(__file__).parent
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), str(seed), str(rounds), str(here), str(here.parent)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    assert [process.communicate()[0].strip() for process in running] == alone
    counts["steps"] = 2 * rounds
