"""Fixtures shared by the tests: devices, CPU variants and the real clips."""

import ctypes
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from support import real_clips
from support.cuda_emulation.compile import build
from support.cuda_emulation.device import ORDERS, Device
from support.cuda_emulation.sanitized import SanitizedDevice


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> torch.device:
    """Parametrizes tests by device. FAIL_WITHOUT_CUDA=1 turns the skip into a failure, so that a GPU job cannot pass by
    skipping.
    """
    if request.param == "cuda" and not torch.cuda.is_available():
        if os.environ.get("FAIL_WITHOUT_CUDA") == "1":
            pytest.fail("FAIL_WITHOUT_CUDA=1, but torch sees no CUDA device")
        pytest.skip("torch sees no CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real clips, $CPR_FAST_SHARED/data."""
    if not real_clips.ROOT.is_dir():
        pytest.skip(f"no real clips: {real_clips.ROOT} does not exist (set CPR_FAST_SHARED)")
    return real_clips.ROOT


@pytest.fixture(scope="session")
def kernel_library() -> ctypes.CDLL:
    """The operator library through its C interface, csrc/cpr_fast.h."""
    from cpr_fast.ops.binding import library as _library

    library = ctypes.CDLL(str(_library.PATH))
    for name in ("cpr_cpu_variants", "cpr_cuda_architectures"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


@pytest.fixture
def cpu_variants(kernel_library):
    """(names, force): the CPU variants of this machine, best first, and a function that forces one for this test."""

    def force(name: str) -> None:
        assert kernel_library.cpr_force_cpu_variant(name.encode()) == 0, name

    yield kernel_library.cpr_cpu_variants().decode().split(","), force
    kernel_library.cpr_force_cpu_variant(None)


@pytest.fixture
def signals_as_in_a_terminal():
    """Ctrl-C and SIGHUP have their defaults, also in processes that a test starts. A shell starts what it runs in the
    background with SIGINT ignored, for which Python then sets no handler, and nohup ignores SIGHUP."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def one_thread():
    """Limits torch to one thread: for tiny tensors, threads mostly wait, especially on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def thread_counts():
    """Returns the thread counts to compare; torch's previous count is restored afterwards."""
    before = torch.get_num_threads()
    yield (1, 2, 5)
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def emulated() -> Device:
    """The CUDA kernels, compiled from their unmodified source for the host."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the kernels for the host")
    return Device(build())


@pytest.fixture(scope="session")
def sanitized() -> SanitizedDevice:
    """The same kernels, compiled so that every access of theirs is observed."""
    return SanitizedDevice.or_skip()


@pytest.fixture(params=ORDERS)
def every_order(request, emulated):
    """Runs threads and blocks in forward, backward and shuffled order."""
    emulated.set_order(request.param)
    yield
    emulated.set_order("forward")


# The folders whose tests compare floating-point results of torch or of the kernels; see `make test`.
NUMERICS = (
    "ops/test_batch_norm",
    "ops/test_cascade_select",
    "ops/test_mil_nce",
    "ops/test_tvl1_flow",
    "ops/loss/",
    "models/",
    "mining/",
    "pretrain/step/",
    "pretrain/state/",
    "pretrain/run/test_learning.py",
)


def pytest_collection_modifyitems(items):
    """Marks the numerical tests, which `make test` repeats with the instruction set of an old processor."""
    tests = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(tests) and str(item.path.relative_to(tests)).startswith(NUMERICS):
            item.add_marker(pytest.mark.numerics)
