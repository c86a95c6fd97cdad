"""Clips cut in parts equal clips cut whole; colours and blur match their formulas and DALI's to two levels of noise."""

import dataclasses
import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from scipy.ndimage import correlate1d, gaussian_filter1d
from support.numbered_videos import clips_at

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.cut import cut_clips, needed_region
from cpr_fast.data.clips.finish import blur_kernel, finish_clip
from cpr_fast.data.clips.sampling import Clips, Sources, clip_frames, plan_pairs
from cpr_fast.data.video.pixels import Region

DATA = DataConfig(frames=13, size=40)
VIDEO = SimpleNamespace(height=40, width=40)


def noise(frames: int, height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, channels), np.uint8)


def coloured(pixels: np.ndarray, **draw) -> np.ndarray:
    out = pixels.copy()
    finish_clip(out, clips_at(VIDEO, [0], **draw), "rgb")
    return out


def draws(count: int) -> list[dict]:
    rng = np.random.default_rng(1)
    low, high = [0.6, 0.6, 0.6, -36, 0.1], [1.4, 1.4, 1.4, 36, 2.0]
    names = ("brightness", "contrast", "saturation", "hue", "sigma")
    return [dict(zip(names, rng.uniform(low, high).astype(np.float32), strict=True)) for _ in range(count)]


EXTREMES = [
    {"brightness": 1.4, "contrast": 1.4, "saturation": 1.4, "hue": 36.0},
    {"brightness": 0.6, "contrast": 1.4, "saturation": 0.0, "hue": -36.0},
    {"sigma": 0.1},
    {"sigma": 2.0},
]


@pytest.mark.parametrize("draw", EXTREMES + draws(8))
def test_colours_and_blur_are_their_formulas(draw):
    """Computes colours in YIQ with NumPy, and the blur with SciPy, in float64."""
    pixels = noise(3, 37, 23)
    expected = pixels.astype(np.float64)
    if len(draw) > 1:
        x = draw["brightness"] * (draw["contrast"] * (expected - 128) + 128)
        luma = np.array([0.299, 0.587, 0.114])
        i, q = x @ [0.596, -0.274, -0.321], x @ [0.211, -0.523, 0.311]
        chroma = draw["saturation"] * np.exp(-1j * np.deg2rad(draw["hue"])) * (i + 1j * q)
        yiq = np.stack([x @ luma, chroma.real, chroma.imag], axis=-1)
        to_rgb = np.linalg.inv([luma, [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
        expected = np.clip(np.round(yiq @ to_rgb.T), 0, 255)
    if "sigma" in draw:
        radius = math.ceil(3 * draw["sigma"])
        for axis in (1, 2):
            expected = gaussian_filter1d(expected, draw["sigma"], axis=axis, mode="mirror", radius=radius)
    assert np.abs(coloured(pixels, **draw) - expected).max() <= 2


@pytest.mark.parametrize("draw", EXTREMES + draws(4))
def test_colours_and_blur_are_dalis(draw):
    """The operators that a GPU runs."""
    dali = pytest.importorskip("nvidia.dali")
    pixels, full = noise(2, 40, 40), {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0, "sigma": 0} | draw

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def graph():
        frames = dali.fn.external_source(lambda: [pixels], layout="FHWC")
        colours = {name: float(full[name]) for name in ("brightness", "contrast", "saturation", "hue")}
        frames = dali.fn.color_twist(frames, **colours)
        return dali.fn.gaussian_blur(frames, sigma=float(full["sigma"])) if full["sigma"] else frames

    expected = np.asarray(graph().run()[0].as_tensor())[0].astype(int)
    difference = np.abs(coloured(pixels, **draw) - expected)
    assert difference.max() <= 2 and np.square(difference).mean() < 0.4


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 1.0, 1.4, 2.0])
def test_the_blur_is_exact(sigma):
    """Blur weights are multiples of 1/256 and sums are integers, so that results are equal on every machine; they
    differ
    from OpenCV's GaussianBlur by two levels of noise.
    """
    pixels, kernel = noise(2, 37, 23), 256 * blur_kernel(sigma)
    assert kernel.sum() == 256 and np.all(kernel == np.round(kernel)) and len(kernel) == 2 * math.ceil(3 * sigma) + 1
    sums = correlate1d(pixels.astype(np.int64), kernel.astype(np.int64), axis=1, mode="mirror")
    sums = correlate1d(sums, kernel.astype(np.int64), axis=2, mode="mirror")
    got = coloured(pixels, sigma=np.float32(sigma))
    np.testing.assert_array_equal(got, (sums + 2**15) >> 16)
    window = (len(kernel), len(kernel))
    theirs = [cv2.GaussianBlur(frame, window, sigma, borderType=cv2.BORDER_REFLECT_101) for frame in pixels]
    assert np.abs(got.astype(int) - theirs).max() <= 2


def test_neutral_colours_change_nothing():
    pixels = noise(2, 9, 9)
    np.testing.assert_array_equal(coloured(pixels), pixels)
    np.testing.assert_array_equal(coloured(pixels, flip=True), pixels[:, :, ::-1])


def test_flow_is_flipped_alone():
    pixels = noise(2, 9, 8)
    out = pixels.copy()
    finish_clip(out, clips_at(VIDEO, [0], flip=True, brightness=0.5, sigma=1.0), "flow")
    np.testing.assert_array_equal(out, pixels[:, :, ::-1])


def test_a_blur_wider_than_the_picture():
    pixels = noise(2, 3, 5)
    assert np.ptp(coloured(pixels, sigma=2.0).astype(int)) < np.ptp(pixels.astype(int))


@pytest.mark.parametrize("augment", ["coclr", "iic", "none"])
@pytest.mark.parametrize("view", ["rgb", "flow"])
def test_parts_and_regions_change_nothing(augment, view):
    """Pairs of clips that overlap, do not overlap or are padded, with strides 1 and 2, for any split of the frames."""
    rng = np.random.default_rng(2)
    for stride, num_frames in ((1, 20), (1, 60), (2, 30), (2, 9)):
        data = dataclasses.replace(DATA, augment=augment, stride=stride)
        pixels = noise(num_frames, 48, 66, 3 if view == "rgb" else 2)
        sources = Sources(*(np.array([value]) for value in (num_frames, 48, 66)))
        for epoch in range(6):
            clips = plan_pairs(sources, np.array([0]), data, 0, epoch)
            region = needed_region(clips, 48, 66, data)
            frames = np.unique([clip_frames(start, data) for start in clips.start])
            needed = region.of("video", pixels[frames], view)
            edges = np.sort(rng.choice(np.arange(1, len(frames)), 2, replace=False))
            got = cut_clips(np.split(needed, edges), clips, view, data, region, finish=True)
            for row in range(2):
                assert_clip(got[row], pixels, clips[[row]], view, data)


def assert_clip(got: np.ndarray, pixels: np.ndarray, clip: Clips, view: str, data: DataConfig) -> None:
    """Equal to a clip that is cut by itself, frame by frame, from whole frames."""
    whole = Region.whole(*pixels.shape[1:3])
    for frame, number in zip(got, clip_frames(clip.start[0], data), strict=True):
        alone = dataclasses.replace(clip, start=np.zeros(1, int))
        one = dataclasses.replace(data, frames=1)
        expected = cut_clips([pixels[[number]]], alone, view, one, whole, finish=True)[0]
        np.testing.assert_array_equal(frame, expected[0])


def test_colours_and_flips_are_left_to_the_graph():
    clips = clips_at(VIDEO, [0], brightness=0.5, sigma=1.0, flip=True)
    pixels = noise(13, 40, 40)
    cut = cut_clips([pixels], clips, "rgb", DATA, Region.whole(40, 40), finish=False)
    np.testing.assert_array_equal(cut[0], pixels)
