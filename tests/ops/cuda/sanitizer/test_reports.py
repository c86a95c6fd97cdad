"""What the sanitizer reports of kernels with one fault each (tests/support/cuda_emulation/sanitizer/faulty.cu)."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch
from support.cuda_emulation.compile import REPOSITORY
from support.operator_references import normal

FAULTS = {  # number of the kernel: blocks, the kind of the report, and a part of its text
    1: (1, "race", "shared memory"),
    2: (1, "race", "; read by thread"),
    3: (1, "race", "data + 0 of 256"),
    4: (2, "race between blocks", "data + 0 of 256"),
    6: (1, "race", "shared memory"),
    10: (1, "out of bounds", "data + 256 of 256"),
    11: (1, "out of bounds", " of 256"),
    12: (1, "uninitialised shared memory", "read of 4 bytes"),
    14: (1, "copy under way", "shared memory"),
    15: (1, "race", "shared memory"),
    16: (1, "overflow", "of a product"),
    21: (1, "fence", "a product without a fence"),
    22: (1, "unpublished", "written by thread"),
    23: (1, "race", "shared memory"),
    24: (1, "product under way", "; a product reads it"),
    25: (1, "product under way", "a sum of a product"),
    26: (1, "product under way", "a factor of a product"),
    27: (1, "unpublished", "written by thread"),
    28: (1, "out of bounds", "of 4096"),
}


def run(device, which: int, blocks: int = 1, stream: int | None = None) -> list[str]:
    device._reset()
    device.reports()
    data = device.allocate("data", (64,), torch.int32)
    handle = ctypes.c_void_p(device.stream if stream is None else stream)
    assert device._library.sanitizer_run_faulty(which, blocks, ctypes.c_void_p(data.data_ptr()), handle) == 0
    return device.reports()


@pytest.mark.parametrize("which", [0, 20])
def test_a_kernel_without_a_fault_has_no_report(device, which):
    assert run(device, which) == []


@pytest.mark.parametrize("which", FAULTS)
def test_every_fault_is_named_with_its_line(device, which):
    blocks, kind, text = FAULTS[which]
    found = [report for report in run(device, which, blocks) if report.startswith(kind + ":")]
    assert found and any(text in report for report in found), found
    assert all("faulty.cu:" in report for report in found)


def test_another_stream_is_reported(sanitized):
    assert "another stream" in run(sanitized, 0, stream=0)[0]


def test_what_was_never_written_is_reported(sanitized):
    """Every output is checked after a call. Here the workspace and outputs of a finished call are looked at again."""
    sanitized._reset()
    part = sanitized._output("indices", (7,), -7, torch.int64)
    assert sanitized._library.sanitizer_unwritten(ctypes.c_void_p(part.data_ptr()), ctypes.c_size_t(56)) == 56
    with pytest.raises(AssertionError, match="unwritten: 56 of 56 bytes"):
        sanitized._finish(None, part)


def test_a_report_fails_the_call(sanitized, monkeypatch):
    reset = sanitized._reset

    def expect_another_stream():
        reset()
        sanitized._library.sanitizer_reset(ctypes.c_void_p(0x77))

    monkeypatch.setattr(sanitized, "_reset", expect_another_stream)
    with pytest.raises(AssertionError, match="stream: a launch on another stream"):
        sanitized.cascade_select(normal(1, 1, 4), normal(1, 5, 4), [0], [2])


@pytest.mark.parametrize(
    ("which", "message"),
    [(5, "threads wait for each other at different lines"), (13, "misaligned\tan address off its type\t")],
)
def test_what_cannot_go_on_stops_the_device(which, message):
    program = (
        "import ctypes; from support.cuda_emulation.sanitized import *\n"
        "device = SanitizedDevice(build(sanitize=True)); data = device.allocate('data', (64,), torch.int32)\n"
        f"device._library.sanitizer_run_faulty({which}, 1, ctypes.c_void_p(data.data_ptr()), "
        "ctypes.c_void_p(device.stream))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY / "tests", capture_output=True, text=True)
    assert result.returncode < 0 and message in result.stderr and "faulty.cu:" in result.stderr
