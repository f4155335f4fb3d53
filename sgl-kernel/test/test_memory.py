"""Mappings that huge pages can back: contents, sharing, sizes and lifetimes."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from sps_kernel import map_shared, use_huge_pages

HUGE = 2 << 20


@pytest.fixture
def memfd():
    fd = os.memfd_create("test")
    os.ftruncate(fd, 2 * HUGE + 5000)
    yield fd
    os.close(fd)


def test_mappings_share_their_bytes(memfd):
    a, b = map_shared(memfd, 2 * HUGE + 5000, writable=True), map_shared(memfd, HUGE + 3)
    assert a.ctypes.data % HUGE == b.ctypes.data % HUGE == 0
    assert a.shape == (2 * HUGE + 5000,) and b.shape == (HUGE + 3,)
    want = np.random.default_rng(0).integers(0, 256, a.size, np.uint8)
    a[:] = want
    answers = [use_huge_pages(a), use_huge_pages(b)]
    assert all(isinstance(x, bool) for x in answers)
    np.testing.assert_array_equal(a, want)
    np.testing.assert_array_equal(b, want[: HUGE + 3])
    assert not b.flags.writeable
    view = b[7:9]
    del b
    np.testing.assert_array_equal(view, want[7:9])


def test_private_memory_keeps_its_contents():
    x = torch.randint(0, 256, (3 * HUGE,), dtype=torch.uint8)
    want = x.clone()
    use_huge_pages(x)
    assert torch.equal(x, want)
    assert not use_huge_pages(x[:100])


def test_refused(memfd):
    for nbytes in (0, -1, 2 * HUGE + 5001):
        with pytest.raises(ValueError, match="nbytes"):
            map_shared(memfd, nbytes)
    with pytest.raises(ValueError, match="cannot map"):
        map_shared(-1, 10)
    with pytest.raises(ValueError, match="contiguous"):
        use_huge_pages(torch.zeros(4 * HUGE, dtype=torch.uint8)[::2])
