"""Page pool: slabs, references, limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from forgeattention.cache import NumpyArrays, PagePool, TorchArrays


@pytest.fixture(params=[NumpyArrays, TorchArrays])
def pool(request: pytest.FixtureRequest) -> PagePool:
    return PagePool(256, request.param(), max_pages=40)


def test_growth_moves_no_page(pool: PagePool) -> None:
    first = pool.alloc(3)
    for i, page in enumerate(first.tolist()):
        pool.page(page)[...] = i + 1
    before = pool.addresses(first).tolist()
    pool.alloc(30)
    assert pool.addresses(first).tolist() == before
    assert [int(pool.page(page)[255]) for page in first.tolist()] == [1, 2, 3]


def test_addresses_are_those_of_the_bytes(pool: PagePool) -> None:
    ids = pool.alloc(5)
    for page, address in zip(ids.tolist(), pool.addresses(ids).tolist()):
        assert pool.arrays.address(pool.page(page)) == address
    assert len(set(pool.addresses(ids).tolist())) == 5


def test_a_page_is_free_when_its_last_reference_is_gone(pool: PagePool) -> None:
    ids = pool.alloc(4)
    pool.share(ids[:2])
    pool.free(ids)
    assert pool.in_use == 2
    assert pool.references(ids[:2]).tolist() == [1, 1]
    pool.free(ids[:2])
    assert (pool.in_use, pool.nbytes) == (0, 0)


def test_the_same_page_twice_in_one_call(pool: PagePool) -> None:
    ids = pool.alloc(1)
    pool.share(np.repeat(ids, 3))
    assert pool.references(ids).tolist() == [4]
    pool.free(np.repeat(ids, 4))
    assert pool.in_use == 0


def test_free_pages_are_used_again(pool: PagePool) -> None:
    ids = pool.alloc(20)
    pool.free(ids[3:9])
    size = pool.nbytes
    again = pool.alloc(6)
    assert sorted(again.tolist()) == sorted(ids[3:9].tolist())
    assert pool.nbytes == size


def test_a_full_pool_changes_nothing(pool: PagePool) -> None:
    pool.alloc(38)
    size = pool.nbytes
    with pytest.raises(ValueError, match=r"\[page_pool\] expected at most 40 pages; got 38 in use and 3 more"):
        pool.alloc(3)
    assert (pool.in_use, pool.nbytes) == (38, size)
    assert len(pool.alloc(2)) == 2


def test_nbytes_is_what_is_allocated_with_little_to_spare() -> None:
    pool = PagePool(4096, TorchArrays())
    for _ in range(700):
        pool.alloc(1)
    slabs = {id(slab): slab.data.untyped_storage().nbytes() for slab in pool._slabs}
    assert pool.nbytes == sum(slabs.values())
    assert 700 * 4096 <= pool.nbytes <= 1.01 * 700 * 4096


def test_tensors_of_inference_mode_can_be_written_outside_of_it() -> None:
    with torch.inference_mode():
        pool = PagePool(64, TorchArrays())
        ids = pool.alloc(1)
    pool.page(int(ids[0]))[...] = 7
    assert int(pool.page(int(ids[0]))[0]) == 7


@pytest.mark.parametrize("arguments", [(0, None), (64, -1)])
def test_bad_sizes(arguments: tuple[int, int | None]) -> None:
    with pytest.raises(ValueError, match=r"\[page_pool\] expected page_bytes >= 1, max_pages >= 0; got"):
        PagePool(arguments[0], NumpyArrays(), arguments[1])
