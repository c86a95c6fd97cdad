"""tvl1_flow from the PTX of its kernel, bit for bit against the CPU kernel."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch
from support.cuda_emulation.compile import REPOSITORY
from support.flow_references import DEFAULTS, SHORT, moving_texture
from support.ptx.build import compile_ptx, find_nvcc
from support.ptx.device import ARCHITECTURES

_DEFAULT = re.search(r"set\(cuda_architectures (80.*)\)", (REPOSITORY / "CMakeLists.txt").read_text())[1]
BUILT = re.findall(r"(\w+)-real", _DEFAULT)  # the architectures of the default build
SPACES = {"global", "shared", "param", "local", "const"}  # any other access is generic

ops = pytest.importorskip("cpr_fast.ops", reason="the operator library is not built")


def assert_equals_cpu(device, clips: torch.Tensor, **settings) -> None:
    settings = DEFAULTS | SHORT | settings
    flow, counted = device.tvl1_flow(clips, settings)
    expected, expected_count = torch.ops.cpr_fast.tvl1_flow(clips, *settings.values())
    assert torch.equal(counted, expected_count)
    assert torch.equal(flow, expected)


@pytest.mark.parametrize("processors", [1, 4, 12])
def test_teams_of_every_kind(device, processors):
    """One block in turn, a team of blocks for each pair, and one block per tile."""
    device.resize(processors=processors)
    assert_equals_cpu(device, moving_texture(3, 41, 70, seed=4)[None], scales=2, warps=2)
    assert len(device.launches_of("tvl1_flow")) == 1


@pytest.mark.parametrize("settings", [{"median": 0}, {"median": 3}, {"median": 5}, {"epsilon": 0.05}])
@pytest.mark.parametrize("size", [(1, 37), (20, 33)])
def test_settings_and_sizes(device, settings, size):
    device.resize(processors=4)
    assert_equals_cpu(device, moving_texture(2, *size, seed=5)[None], **settings)


def test_float_frames_of_several_clips_in_another_order(device):
    device.resize(processors=4)
    device.set_order("backward")
    clips = torch.stack([moving_texture(3, 18, 30, seed) for seed in range(2)]) / 255
    assert_equals_cpu(device, clips, warps=2)


def test_a_pixel_that_is_not_finite(device):
    device.resize(processors=4)
    clips = (moving_texture(2, 20, 30, seed=7) / 255)[None]
    clips[0, 0, 3, 3] = torch.nan
    flow, _ = device.tvl1_flow(clips, DEFAULTS | SHORT)
    assert flow.isnan().all()


def test_no_access_is_generic_or_to_local_memory(device):
    """A pointer or reference to shared or global memory that is a member of a stored object, or is passed to a function
    that is not inlined, becomes a generic address, and such an object lies in local memory."""
    text = compile_ptx("tvl1_flow", device.architecture).read_text()
    accesses = re.findall(r"^\s+(?:@!?%p\d+ )?((?:ld|st|atom|red)\.\S+)", text, re.MULTILINE)
    assert len(accesses) > 100
    assert {access for access in accesses if not SPACES & set(access.split("."))} == set()
    assert {access for access in accesses if "local" in access.split(".")} == set()


@pytest.mark.parametrize(
    "architecture",
    [*ARCHITECTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in BUILT if name not in ARCHITECTURES)],
)
def test_no_register_is_spilled(architecture, tmp_path):
    """For every architecture of the default build that this nvcc knows."""
    assert architecture in BUILT
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc to compile the kernel")
    known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    if f"sm_{architecture.rstrip('a')}" not in known:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    ptx = compile_ptx("tvl1_flow", architecture)
    command = [nvcc, "-cubin", "-Xptxas", "-v", f"-arch=sm_{architecture}", str(ptx), "-o", str(tmp_path / "cubin")]
    log = subprocess.run(command, check=True, capture_output=True, text=True)
    report = log.stdout + log.stderr
    numbers = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert numbers == [("0", "0", "0")]  # of one function: the kernel
