"""Compares tvl1_flow with OpenCV, with a step-by-step NumPy run of the algorithm and with its plain-torch reference.

The stop test and the median filter amplify rounding: two correct programs can differ by pixels at a few places. Long
runs are therefore compared in the mean and at the 99th percentile, short runs (few iterations) tightly.
"""

import ctypes

import numpy as np
import pytest
import torch
from support import real_clips
from support.flow_references import DEFAULTS, SHORT, assert_close_to_opencv, moving_texture, opencv_flow

from cpr_fast.ops import tvl1_flow, tvl1_flow_ref
from cpr_fast.ops.binding import library as _library
from cpr_fast.ops.tvl1_flow import stop_tvl1_flow

cv2 = pytest.importorskip("cv2")
if not hasattr(cv2, "optflow"):
    pytest.skip("OpenCV without its contrib modules", allow_module_level=True)

cv2.setNumThreads(1)  # OpenCV's threads wait actively


def read_or_skip(count: int, frames: int, size: tuple[int, int]) -> torch.Tensor:
    """`real_clips.read_gray`, or skips the test if the clips are missing."""
    try:
        return real_clips.read_gray(count, frames, size)
    except real_clips.Absent as absent:
        pytest.skip(str(absent))


def step_by_step(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, int]:
    """Runs the algorithm with default settings, using image operations of OpenCV and NumPy: flow [2, H, W],
    pixel-iterations.
    """
    levels = [np.stack([first, second]).astype(np.float32)]
    for _ in range(4):
        smaller = [cv2.resize(i, None, fx=0.8, fy=0.8, interpolation=cv2.INTER_LINEAR) for i in levels[-1]]
        if min(smaller[0].shape) < 16:
            break
        levels.append(np.stack(smaller))
    flow, pixel_iterations = np.zeros((2, *levels[-1].shape[1:]), np.float32), 0
    for i0, i1 in reversed(levels):
        if flow.shape[1:] != i0.shape:
            flow = np.stack([cv2.resize(c, i0.shape[::-1], interpolation=cv2.INTER_LINEAR) for c in flow]) * np.float32(
                1.25
            )
        edged = np.pad(i1, 1, mode="edge")
        images = (i1, (edged[1:-1, 2:] - edged[1:-1, :-2]) / 2, (edged[2:, 1:-1] - edged[:-2, 1:-1]) / 2)
        dual = np.zeros((2, 2, *i0.shape), np.float32)
        y, x = np.mgrid[: i0.shape[0], : i0.shape[1]].astype(np.float32)
        for _ in range(5):
            warped, gx, gy = (cv2.remap(i, x + flow[0], y + flow[1], cv2.INTER_CUBIC) for i in images)
            flow, iterations = minimise(flow, dual, np.stack([gx, gy]), warped - gx * flow[0] - gy * flow[1] - i0)
            pixel_iterations += iterations * i0.size
    return flow, pixel_iterations


def minimise(u: np.ndarray, dual: np.ndarray, g: np.ndarray, residual: np.ndarray) -> tuple[np.ndarray, int]:
    """Does up to 10 x 30 iterations from u; updates `dual` in place. Returns u and the iterations done."""
    bound, squared_norm = np.float32(0.15 * 0.3), (g * g).sum(0)
    for iteration in range(300):
        if iteration % 30 == 0:
            u = np.stack([cv2.medianBlur(c, 5) for c in u])
        rho = residual + (g * u).sum(0)
        step = np.clip(-rho / np.maximum(squared_norm, np.float32(1e-30)), -bound, bound)
        above = np.pad(dual[:, 1, :-1], ((0, 0), (1, 0), (0, 0)))
        divergence = np.diff(dual[:, 0], axis=2, prepend=np.float32(0)) + (dual[:, 1] - above)
        divergence[:, :, 0] = dual[:, 0, :, 0] + dual[:, 1, :, 0] - above[:, :, 0]  # in OpenCV's order of additions
        new = (u + step * g + np.float32(0.3) * divergence).astype(np.float32)
        ux, uy = np.diff(new, axis=2, append=new[:, :, -1:]), np.diff(new, axis=1, append=new[:, -1:])
        shrink = 1 + np.float32(0.25 / 0.3) * np.hypot(ux, uy)
        dual[:, 0] = (dual[:, 0] + np.float32(0.25 / 0.3) * ux) / shrink
        dual[:, 1] = (dual[:, 1] + np.float32(0.25 / 0.3) * uy) / shrink
        change, u = ((new - u) ** 2).sum(), new
        if change <= 1e-4 * residual.size:
            break
    return u, iteration + 1


def test_finds_a_known_translation(device):
    clip = moving_texture(2, 96, 128, seed=0, velocity=(1.5, -0.7)).to(device)
    centre = tvl1_flow(clip)[0, :, 38:58, 54:74]  # well inside the disc
    assert (centre.cpu() - torch.tensor([1.5, -0.7])[:, None, None]).norm(dim=0).mean() < 0.1


def test_a_still_video_has_exactly_no_flow():
    frame = moving_texture(1, 50, 61, seed=1)
    assert not tvl1_flow(frame.expand(3, -1, -1)).any()


def test_synthetic_videos_as_opencv(device):
    clips = torch.stack([moving_texture(2, 120, 160, seed, (1.2 + seed / 2, -0.6)) for seed in range(4)])
    assert_close_to_opencv(tvl1_flow(clips.to(device)).cpu(), torch.stack([opencv_flow(clip) for clip in clips]))


def test_real_videos_as_opencv(device):
    clips = read_or_skip(6, 2, (160, 120))
    assert_close_to_opencv(tvl1_flow(clips.to(device)).cpu(), torch.stack([opencv_flow(clip) for clip in clips]))


def test_pixel_iterations_as_opencv():
    try:
        clips = real_clips.read_gray(5, 2, (96, 72))
    except real_clips.Absent:  # still an independent check without the real videos
        clips = torch.stack([moving_texture(2, 72, 96, seed) for seed in range(5)])
    _, counted = torch.ops.cpr_fast.tvl1_flow(clips, *DEFAULTS.values())
    flows, expected = zip(*(step_by_step(*clip.numpy()) for clip in clips), strict=True)
    # The step-by-step run is OpenCV's algorithm: it gives OpenCV's flow.
    error = (torch.from_numpy(np.stack(flows)) - torch.cat([opencv_flow(clip) for clip in clips])).norm(dim=1)
    assert error.mean() < 0.01
    assert counted.sum().item() == pytest.approx(sum(expected), rel=0.02)


@pytest.mark.parametrize("settings", [{"median": 1}, {"median": 3}, {"scales": 3, "warps": 2}, {"scale_step": 0.5}])
def test_short_run_as_opencv(settings):
    clip = moving_texture(2, 47, 70, seed=2)
    settings = SHORT | {"scales": 2} | settings
    torch.testing.assert_close(tvl1_flow(clip, **settings), opencv_flow(clip, **settings), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 37), (37, 1), (2, 3), (16, 16), (15, 64), (20, 33), (48, 17), (31, 97)])
def test_any_size_as_reference(size, device):
    clip = moving_texture(3, *size, seed=3).to(device)
    torch.testing.assert_close(tvl1_flow(clip, **SHORT), tvl1_flow_ref(clip, **SHORT), atol=1e-3, rtol=0)
    assert tvl1_flow(clip).isfinite().all()


def test_whole_run_as_reference():
    clips = torch.stack([moving_texture(2, 26, 36, seed) for seed in (4, 5)])
    coarse = {"epsilon": 0.02, "warps": 3}  # fewer iterations, because the reference is slow
    assert (tvl1_flow(clips, **coarse) - tvl1_flow_ref(clips, **coarse)).norm(dim=-3).mean() < 0.05


def test_leading_dimensions_and_pairs_are_independent(device):
    clips = torch.stack([moving_texture(4, 33, 50, seed) for seed in range(6)]).reshape(2, 3, 4, 33, 50).to(device)
    flow = tvl1_flow(clips)
    assert flow.shape == (2, 3, 3, 2, 33, 50)
    assert torch.equal(flow[1, 2, 1], tvl1_flow(clips[1, 2, 1:3])[0])
    assert torch.equal(flow, tvl1_flow(clips.permute(2, 0, 1, 4, 3).contiguous().permute(1, 2, 0, 4, 3)))
    assert tvl1_flow(clips[:0]).shape == (0, 3, 3, 2, 33, 50)


@pytest.mark.parametrize("shape", [(1, 8, 40, 52), (7, 2, 33, 47), (3, 4, 16, 90)])
def test_thread_count_does_not_change_a_bit(shape):
    """Clips and single pairs; also more threads than pairs."""
    clips = torch.stack([moving_texture(*shape[1:], seed=6 + i) for i in range(shape[0])])
    threads = torch.get_num_threads()
    flows = []
    try:
        for count in (1, 2, 3, 40):
            torch.set_num_threads(count)
            flows += [tvl1_flow(clips) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    alone = torch.stack([torch.cat([tvl1_flow(clip[t : t + 2]) for t in range(len(clip) - 1)]) for clip in clips])
    for flow in flows:
        assert torch.equal(flow, alone)


def test_uint8_equals_float():
    clip = moving_texture(2, 41, 53, seed=7)
    assert torch.equal(tvl1_flow(clip), tvl1_flow(clip.float() / 255))


def test_cpu_variants_give_the_same_bits():
    library = ctypes.CDLL(str(_library.PATH))
    library.cpr_cpu_variants.restype = ctypes.c_char_p
    clip, flows = moving_texture(2, 60, 83, seed=8), {}
    try:
        for name in library.cpr_cpu_variants().split(b","):
            assert library.cpr_force_cpu_variant(name) == 0
            flows[name] = torch.cat([tvl1_flow(clip), tvl1_flow(clip, median=3)])
    finally:
        library.cpr_force_cpu_variant(None)
    assert b"portable" in flows
    assert all(torch.equal(flow, flows[b"portable"]) for flow in flows.values())


def test_operator_registration(device):
    clip = moving_texture(2, 20, 24, seed=9).to(device)
    torch.library.opcheck(torch.ops.cpr_fast.tvl1_flow.default, (clip[None], *DEFAULTS.values()))
    compiled = torch.compile(lambda frames: 2 * tvl1_flow(frames), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(clip), 2 * tvl1_flow(clip))


@pytest.mark.parametrize(
    ("frames", "settings", "error", "message"),
    [
        (torch.zeros(2, 8, 8, dtype=torch.float64), {}, TypeError, "frames: .*got torch.float64"),
        (torch.zeros(8, 8), {}, ValueError, r"frames: expected shape \[..., T, H, W\].*got \[8, 8\]"),
        (torch.zeros(1, 8, 8), {}, ValueError, r"frames: .*got \[1, 8, 8\]"),
        (torch.zeros(2, 0, 8), {}, ValueError, r"frames: .*got \[2, 0, 8\]"),
        (torch.zeros(2, 8, 8, device="meta"), {}, NotImplementedError, "frames: .*meta"),
        (torch.zeros(2, 8, 8), {"tau": 0}, ValueError, "tau: expected a positive finite number, got 0"),
        (torch.zeros(2, 8, 8), {"lambda_": -1.0}, ValueError, "lambda_: .*got -1.0"),
        (torch.zeros(2, 8, 8), {"theta": float("nan")}, ValueError, "theta: .*got nan"),
        (torch.zeros(2, 8, 8), {"scale_step": 1.0}, ValueError, "scale_step: .*got 1.0"),
        (torch.zeros(2, 8, 8), {"epsilon": -0.1}, ValueError, "epsilon: .*got -0.1"),
        (torch.zeros(2, 8, 8), {"scales": 0}, ValueError, "scales: expected an int in 1..2147483647, got 0"),
        (torch.zeros(2, 8, 8), {"warps": 1.5}, TypeError, "warps: expected an int, got 1.5"),
        (torch.zeros(2, 8, 8), {"inner_iterations": 0}, ValueError, "inner_iterations: .*got 0"),
        (torch.zeros(2, 8, 8), {"outer_iterations": 0}, ValueError, "outer_iterations: .*got 0"),
        (torch.zeros(2, 8, 8), {"median": 7}, ValueError, "median: .*got 7"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(frames, settings, error, message):
    with pytest.raises(error, match=message):
        tvl1_flow(frames, **settings)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_pixel_that_is_not_finite_gives_nan_flow_to_its_two_pairs_alone(value, device):
    clip = moving_texture(5, 30, 40, seed=10).to(device) / 255
    expected = tvl1_flow(clip)
    clip[2, 3, 3] = value
    flow, counted = torch.ops.cpr_fast.tvl1_flow(clip[None], *DEFAULTS.values())
    assert flow[0, 1:3].isnan().all() and counted[0, 1:3].tolist() == [0, 0]
    assert torch.equal(flow[0, [0, 3]], expected[[0, 3]])


def test_a_stopped_call_raises_until_calls_are_allowed_again():
    clip = moving_texture(3, 30, 40, seed=11)
    expected = tvl1_flow(clip)
    stop_tvl1_flow(True)
    try:
        with pytest.raises(RuntimeError, match="^tvl1_flow: stopped$"):
            tvl1_flow(clip)
    finally:
        stop_tvl1_flow(False)
    assert torch.equal(tvl1_flow(clip), expected)
