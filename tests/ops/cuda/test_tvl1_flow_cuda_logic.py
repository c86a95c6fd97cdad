"""The CUDA kernel of tvl1_flow, executed on the host from its unmodified source (tests/support/cuda_emulation).

Every operation is rounded as on the CPU, so the flows are compared bit for bit: with a fixed number of iterations
in every case, with the stop test if no error sum lies within rounding of the threshold (none does here).
"""

import pytest
import torch
from support import real_clips
from support.flow_references import DEFAULTS, SHORT, assert_close_to_opencv, moving_texture, opencv_flow

pytest.importorskip("cpr_fast.ops", reason="the operator library is not built")  # registers torch.ops.cpr_fast

BLOCKS = 4  # blocks that are resident at once in most tests, so that a team of several blocks solves each pair


@pytest.fixture
def device(emulated):
    emulated.resize(processors=BLOCKS)
    yield emulated
    emulated.resize()


def assert_equals_cpu(device, clips: torch.Tensor, **settings) -> torch.Tensor:
    """Returns the flow of clips [N, T, H, W], after comparing it and the pixel-iterations with those of the CPU
    kernel.
    """
    settings = DEFAULTS | settings
    flow, counted = device.tvl1_flow(clips, settings)
    expected, expected_count = torch.ops.cpr_fast.tvl1_flow(clips, *settings.values())
    assert torch.equal(counted, expected_count)
    assert torch.equal(flow, expected)
    return flow


def test_whole_runs_equal_the_cpu_kernel_and_opencv(device):
    clips = torch.stack([moving_texture(2, 66, 90, seed, (1.2 + seed, -0.6)) for seed in (0, 1)])
    flow = assert_equals_cpu(device, clips)
    assert_close_to_opencv(flow, torch.stack([opencv_flow(clip) for clip in clips]))


def test_real_videos_equal_the_cpu_kernel_and_opencv(device):
    try:
        clips = real_clips.read_gray(2, 2, (80, 60))
    except real_clips.Absent as absent:
        pytest.skip(str(absent))
    flow = assert_equals_cpu(device, clips)
    assert_close_to_opencv(flow, torch.stack([opencv_flow(clip) for clip in clips]))


def test_every_order_of_threads_and_blocks_gives_the_same_bits(device, every_order):
    assert_equals_cpu(device, moving_texture(2, 41, 70, seed=3)[None], warps=2, outer_iterations=3)


@pytest.mark.parametrize("processors", [1, 2, 3, 5, 12])
def test_no_team_size_changes_a_bit(device, processors):
    """Solves two pairs with one block in turn, one block each, a spare block, teams of two blocks, and teams with one
    block per tile.
    """
    device.resize(processors=processors)
    launches = device.launches()
    clips = moving_texture(3, 70, 133, seed=4)[None]
    assert_equals_cpu(device, clips, scales=2, warps=1, outer_iterations=2)
    assert device.launches() == launches + 1


@pytest.mark.parametrize("size", [(1, 1), (1, 37), (37, 1), (2, 3), (16, 16), (20, 33), (32, 64), (33, 65), (65, 129)])
def test_any_size(device, size):
    assert_equals_cpu(device, moving_texture(3, *size, seed=5)[None], **SHORT)


@pytest.mark.parametrize(
    "settings",
    [{"median": 0}, {"median": 3}, {"median": 5, "outer_iterations": 3}, {"scales": 3, "warps": 2, "scale_step": 0.6},
     {"inner_iterations": 1}, {"inner_iterations": 23}, {"epsilon": 0.05, "inner_iterations": 30}, {"tau": 0.1},
     {"lambda_": 1.0, "theta": 0.5}],
)  # fmt: skip
def test_every_setting(device, settings):
    clips = moving_texture(2, 40, 70, seed=6)[None]
    assert_equals_cpu(device, clips, **{**SHORT, "scales": 2, "warps": 2, **settings})


def test_more_pairs_than_blocks_and_several_clips(device):
    clips = torch.stack([moving_texture(4, 18, 30, seed) for seed in range(3)])
    flow = assert_equals_cpu(device, clips, warps=2)
    assert torch.equal(flow[1, 2:], device.tvl1_flow(clips[1:2, 2:].clone(), DEFAULTS | {"warps": 2})[0][0])


def test_float_frames_and_pixels_that_are_not_finite(device):
    clips = (moving_texture(4, 20, 30, seed=7) / 255)[None]
    assert_equals_cpu(device, clips, **SHORT)
    clips[0, 0, 3, 3] = float("nan")
    clips[0, 3, 19, 29] = float("inf")
    flow, counted = device.tvl1_flow(clips, DEFAULTS | SHORT)
    expected, expected_count = torch.ops.cpr_fast.tvl1_flow(clips, *(DEFAULTS | SHORT).values())
    assert flow[0, [0, 2]].isnan().all() and torch.equal(flow[0, 1], expected[0, 1])
    assert torch.equal(counted, expected_count) and counted[0].tolist()[::2] == [0, 0]


def test_a_still_video_and_no_video(device):
    still = moving_texture(1, 50, 61, seed=8).expand(2, -1, -1)[None].contiguous()
    assert not assert_equals_cpu(device, still).any()
    assert device.tvl1_flow(still[:0], DEFAULTS)[0].shape == (0, 1, 2, 50, 61)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"median": 7}, "median must be"), ({"scale_step": 1.0}, "scale_step must"), ({"tau": -1.0}, "tau, lambda")],
)
def test_bad_arguments_are_refused(device, settings, message):
    with pytest.raises(RuntimeError, match=message):
        device.tvl1_flow(moving_texture(2, 18, 20, seed=9)[None], DEFAULTS | settings)
