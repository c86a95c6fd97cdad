"""tvl1_flow from the PTX of its kernel, bit for bit against the CPU kernel."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch
from support.flow_references import DEFAULTS, SHORT, moving_texture
from support.ptx.build import compile_ptx, find_nvcc
from support.ptx.device import ARCHITECTURES

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


@pytest.mark.usefixtures("ptx_devices")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiles_are_not_read_through_generic_addresses_and_the_iterations_do_not_spill(architecture, tmp_path):
    """A reference to shared memory that is a member of a class which is not inlined becomes a generic address."""
    ptx = compile_ptx("tvl1_flow", architecture)
    assert "cvta.shared" not in ptx.read_text() and "ld.shared" in ptx.read_text()
    command = [find_nvcc(), "-cubin", "-Xptxas", "-v", f"-arch=sm_{architecture}", str(ptx)]
    log = subprocess.run([*command, "-o", str(tmp_path / "cubin")], check=True, capture_output=True, text=True)
    report = log.stdout + log.stderr
    found = re.findall(r"properties for _ZN3cpr4tvl16Solver\d+(\w+?)E\w+\n.*?(\d+) bytes spill stores", report)
    spilled = {name: int(stored) for name, stored in found}
    assert {name: spilled[name] for name in ("start_level", "warp_images", "iterate")} == {
        "start_level": 0,
        "warp_images": 0,
        "iterate": 0,
    }
