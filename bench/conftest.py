"""Options and fixtures of the pytest-benchmark suites.

    pytest bench --benchmark-only [--all-shapes] [-k "cuda and not torch.compile"] [--benchmark-json=FILE]

Times are wall clock with the current number of threads of torch, one form after another: use them to follow one form
over time. `python bench/kernels/compare.py` compares the forms, interleaved. On the CPU the suites end at (B, K) =
(256, 65536); larger shapes, up to (4096, 1M), run on CUDA or with --all-shapes. A form that cannot run is skipped with
the reason.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from forms import ALL_SHAPES, Unavailable
from measure import measure_rates, peak_mib, world


def pytest_addoption(parser):
    parser.addoption("--all-shapes", action="store_true", help="run shapes beyond (256, 65536) on the CPU as well")


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", ALL_SHAPES, ids=lambda shape: f"B{shape[0]}-K{shape[1]}")
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", "cuda"])


@pytest.fixture(scope="session")
def rates():
    """Returns a function that measures the rates of a device once."""
    known = {}
    return lambda device: known[device] if device in known else known.setdefault(device, measure_rates(device))


@pytest.fixture
def bench_form(benchmark, request, rates):
    """Times one form at one shape. The machine and the software are recorded in extra_info."""

    def run(op, device: str, shape: tuple[int, int], direction: str, name: str) -> None:
        B, K = shape
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")
        if device == "cpu" and B * K > 256 * 65536 and not request.config.getoption("--all-shapes"):
            pytest.skip("beyond (256, 65536) the CPU runs with --all-shapes only")
        inputs = op.make_inputs(B, K, device, direction, torch.float32)
        try:
            call = op.FORMS[name](inputs)
            result = call()
        except Unavailable as reason:
            pytest.skip(str(reason))
        except torch.cuda.OutOfMemoryError:
            pytest.skip("out of device memory: the form holds [B, K] matrices")
        floor_s = rates(device).floor_s(*op.work(B, K, direction), torch.float32)
        row = {"op": op.OP, "direction": direction, "form": name, "B": B, "K": K, "D": op.D, "dtype": "float32"}
        row |= {"floor_us": 1e6 * floor_s, "peak_mib": peak_mib(call, device)}
        row["error"] = None if name in op.NO_ERROR else op.error(inputs, result)
        benchmark.extra_info.update(row | world(device))
        benchmark(_synchronised(call) if device == "cuda" else call)
        benchmark.extra_info["ratio"] = benchmark.stats.stats.median / floor_s

    return run


def _synchronised(call):
    def wait():
        call()
        torch.cuda.synchronize()

    return wait
