"""compact under the emulator."""

import numpy as np
import pytest

from forgeattention import reference
from forgeattention.backends.metal import pages as metal_pages

from .cases import Emulator


@pytest.mark.parametrize("words", [1, 127, 512, 513, 800])
def test_pages_are_copied_bit_for_bit(words):
    size = 16 * words
    base = np.random.default_rng(words).integers(0, 256, 5 * size + 16, np.uint8)
    at = np.array([3, 0, 4, 3], np.int64) * size + 16
    device = Emulator()
    out = metal_pages.compact(base, at, size, device)
    np.testing.assert_array_equal(out, reference.compact(base, at, size))
    # every byte of a page is read once
    assert device.bytes_read["base"] == len(at) * size


def test_no_pages():
    assert metal_pages.compact(np.zeros(64, np.uint8), np.zeros(0, np.int64), 16, Emulator()).shape == (0, 16)


def test_addresses_are_refused():
    with pytest.raises(ValueError, match=r"\[compact\] expected an array that holds the pages"):
        metal_pages.compact(None, np.zeros(1, np.int64), 16, Emulator())
