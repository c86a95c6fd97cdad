"""Fixtures of the tests that run the CUDA kernels under the sanitizer."""

import pytest
from support.cuda_emulation.device import ORDERS

POISONS = {"forward": 0xFF, "backward": 0x3F, "shuffled": 0x80}  # NaN, about 0.75, and denormal floats


@pytest.fixture(params=ORDERS)
def device(request, sanitized):
    """The sanitized device, in every order of threads and blocks, each with another filling of unwritten memory."""
    sanitized.set_order(request.param)
    sanitized.set_poison(POISONS[request.param])
    yield sanitized
    _restore(sanitized)


@pytest.fixture(params=["shuffled"])
def shuffled(request, sanitized):
    """The sanitized device in one order, for cases that do not depend on it."""
    sanitized.set_order(request.param)
    sanitized.set_poison(0xFF)
    yield sanitized
    _restore(sanitized)


def _restore(sanitized):
    sanitized.set_order("forward")
    sanitized.set_poison(0xFF)
    sanitized.resize()
    sanitized.set_capability()
    sanitized.use(0)
    sanitized.offset = sanitized.workspace_offset = 0
    sanitized.choose_blocks("all")
    sanitized.start_queue(0)
