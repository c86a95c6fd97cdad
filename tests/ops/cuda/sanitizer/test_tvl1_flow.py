"""tvl1_flow under the sanitizer, with teams of one and of several blocks, bit for bit against the CPU kernel."""

from __future__ import annotations

import pytest
import torch
from support.flow_references import DEFAULTS, SHORT, moving_texture

pytest.importorskip("cpr_fast.ops", reason="the operator library is not built")


def assert_equals_cpu(device, clips: torch.Tensor, **settings) -> None:
    settings = DEFAULTS | settings
    found = device.tvl1_flow(clips, settings)
    expected = torch.ops.cpr_fast.tvl1_flow(clips, *settings.values())
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("processors", [1, 2, 8])  # one block in turn, a block for each pair, teams of four blocks
def test_every_team_and_order(device, processors):
    device.resize(processors=processors)
    clips = moving_texture(3, 41, 70, seed=1)[None]
    assert_equals_cpu(device, clips, scales=2, warps=2, outer_iterations=2, inner_iterations=9)


@pytest.mark.parametrize("median", [0, 3, 5])
@pytest.mark.parametrize("processors", [1, 4])
def test_every_median(shuffled, median, processors):
    shuffled.resize(processors=processors)
    assert_equals_cpu(shuffled, moving_texture(2, 33, 65, seed=2)[None], **SHORT | {"median": median})


@pytest.mark.parametrize("size", [(1, 1), (1, 37), (37, 1), (16, 16), (65, 66)])
def test_odd_sizes_and_more_pairs_than_blocks(shuffled, size):
    shuffled.resize(processors=2)
    clips = torch.stack([moving_texture(3, *size, seed=seed) for seed in (3, 4)])
    assert_equals_cpu(shuffled, clips, **SHORT | {"scales": 3, "inner_iterations": 5})


def test_the_stop_test_within_a_block_of_iterations(shuffled):
    shuffled.resize(processors=2)
    clips = moving_texture(2, 33, 66, seed=5)[None]
    assert_equals_cpu(shuffled, clips, scales=2, warps=2, epsilon=0.05, outer_iterations=3, inner_iterations=11)


@pytest.mark.parametrize("processors", [1, 4])
def test_float_frames_and_pixels_that_are_not_finite(shuffled, processors):
    shuffled.resize(processors=processors)
    clips = (moving_texture(4, 20, 70, seed=6) / 255)[None]
    clips[0, 0, 3, 3], clips[0, 3, 19, 29] = float("nan"), float("inf")
    assert_equals_cpu(shuffled, clips, **SHORT)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("slope", [-1, 1])
def test_samples_far_outside_the_image(shuffled, axis, slope):
    """A weak gradient and a great difference of the frames give a flow of more than a hundred pixels."""
    shuffled.resize(processors=2)
    along = (150 + slope * torch.arange(48)).to(torch.uint8)
    image = along[:, None].expand(48, 40) if axis == 0 else along[:40].expand(48, 40)
    clips = torch.stack([torch.zeros_like(image), image])[None].contiguous()
    settings = SHORT | {"lambda_": 1000.0, "warps": 3}
    component = torch.ops.cpr_fast.tvl1_flow(clips, *(DEFAULTS | settings).values())[0][:, :, 1 - axis]
    assert (component * -slope).max() > 100
    assert_equals_cpu(shuffled, clips, **settings)


def test_on_the_other_device(shuffled):
    for now in (0, 1):
        shuffled.use(now)
        shuffled.resize(processors=2 + now)
        assert_equals_cpu(shuffled, moving_texture(2, 20, 66, seed=7)[None], **SHORT)


def test_frames_and_flows_of_more_than_2_to_the_32_elements(shuffled):
    shuffled.choose_blocks("edges")
    shuffled.resize(processors=2)
    T, last = 262_200, moving_texture(3, 128, 128, seed=8)
    frames = shuffled.allocate("frames", (1, T, 128, 128), torch.uint8)
    frames[0, -3:] = last
    shuffled.start_queue(T - 3)  # the last two pairs
    flow, _ = shuffled.tvl1_flow(frames, DEFAULTS | SHORT)
    expected, _ = torch.ops.cpr_fast.tvl1_flow(last[None], *(DEFAULTS | SHORT).values())
    assert torch.equal(flow[0, -2:], expected[0])
