"""Fixtures of the tests that execute the compiler's output (tests/support/ptx)."""

import shutil

import pytest
from support.ptx.build import find_nvcc
from support.ptx.device import ARCHITECTURES, PtxDevice
from support.ptx.interpreter import Interpreter


@pytest.fixture(scope="session")
def ptx_devices():
    """The devices by architecture; made when first asked for, because nvcc takes most of the time."""
    if find_nvcc() is None:
        pytest.skip("needs nvcc to compile the kernels to PTX")
    if shutil.which("g++") is None or shutil.which("nm") is None:
        pytest.skip("needs g++ and nm to build the interpreter of PTX")
    return {}


@pytest.fixture(params=[ARCHITECTURES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES[1:])])
def device(request, ptx_devices) -> PtxDevice:
    """Executes the PTX of each architecture, sm_80 and sm_90a."""
    if request.param not in ptx_devices:
        ptx_devices[request.param] = PtxDevice(request.param)
    made = ptx_devices[request.param]
    made.select()
    made.reset_counts()
    yield made
    made.resize()
    made.set_order("forward")
    made.set_occupancy(1)


@pytest.fixture(scope="session")
def interpreter() -> Interpreter:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to build the interpreter of PTX")
    return Interpreter()
