"""The conversion of boxes of 4:2:0 pictures equals swscale's of whole pictures, bit for bit, on every CPU variant."""

import os
import platform
import subprocess
import sys

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from cpr_fast._host import Yuv420ToRgb

from cpr_fast import _host
from cpr_fast.data.video import pixels
from cpr_fast.data.video.pixels import Region, pixels_of

VARIANTS = _host.build_info()["cpu_variants"].split(",")
LIMITED, FULL = 1, 2  # AVCOL_RANGE of FFmpeg
# AVCOL_SPC of FFmpeg and the weights of red and blue in luma, ITU-T H.273
MATRICES = {1: (0.2126, 0.0722), 4: (0.3, 0.11), 5: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}
X86 = platform.machine() in ("x86_64", "AMD64")
swscale_of_x86 = pytest.mark.skipif(not X86, reason="swscale rounds otherwise on other processors")
# Compares in a process of its own, because the variant is chosen once per process.
COMPARE = """
import sys
from test_yuv_to_rgb import compare_boxes, compare_levels
getattr(sys.modules["test_yuv_to_rgb"], sys.argv[1])()
"""


def picture(y, u, v, colorspace, color_range, pixel_format="yuv420p"):
    frame = av.VideoFrame(y.shape[1], y.shape[0], pixel_format)
    for plane, levels in zip(frame.planes, (y, u, v), strict=True):
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: levels.shape[0], : levels.shape[1]] = levels
    frame.colorspace, frame.color_range = colorspace, color_range
    return frame


def noise(rng, height, width, *colours):
    planes = (rng.integers(0, 256, (height // s, width // s), np.uint8) for s in (1, 2, 2))
    return picture(*planes, *colours)


def by_swscale(frame):
    plane = VideoReformatter().reformat(frame, format="rgb24", threads=1).planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(frame.height, plane.line_size)
    return rows[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)


def converted(frame, convert, top, left, out):
    convert([frame.planes], frame.height, top, left, out[None])
    return out


def compare_levels():
    """Every one of the 2**24 triples of levels."""
    y = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (256, 256))  # [4096, 4096]
    u, v = np.meshgrid(*[np.arange(256, dtype=np.uint8)] * 2)
    u, v = (chroma.repeat(8, 0).repeat(8, 1) for chroma in (u, v))  # each pair in a square of 16x16 pixels
    for color_range in (LIMITED, FULL):
        for colorspace, weights in MATRICES.items():
            frame = picture(y, u, v, colorspace, color_range)
            out = converted(
                frame, Yuv420ToRgb(*weights, color_range == FULL), 0, 0, np.empty((4096, 4096, 3), np.uint8)
            )
            assert np.array_equal(out, by_swscale(frame)), (colorspace, color_range)


def compare_boxes():
    """Random boxes of even sides, at any even place, into rows that are not adjacent."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        height, width = (2 * int(2 ** rng.uniform(0, 7)) for _ in range(2))
        colorspace, color_range = int(rng.choice(list(MATRICES))), int(rng.choice([LIMITED, FULL]))
        frame = noise(rng, height, width, colorspace, color_range)
        (top, bottom), (left, right) = (np.sort(rng.integers(0, side // 2 + 1, 2)) * 2 for side in (height, width))
        around = np.full((bottom - top, right - left + 2, 3), 7, np.uint8)
        convert = Yuv420ToRgb(*MATRICES[colorspace], color_range == FULL)
        out = converted(frame, convert, top, left, around[:, 1:-1])
        assert np.array_equal(out, by_swscale(frame)[top:bottom, left:right]), (height, width, top, bottom, left, right)
        assert (around[:, [0, -1]] == 7).all()


@swscale_of_x86
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("compare", ["compare_levels", "compare_boxes"])
def test_equals_swscale(variant, compare):
    if variant in _host.build_info().get("cpu_variants_emulated", "") and compare == "compare_levels":
        pytest.skip("an emulated variant is slow")
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = os.environ | {"CPR_FAST_CPU_VARIANT": variant, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", COMPARE, compare], env=environment, check=True)


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("weights", MATRICES.values())
def test_is_the_conversion_of_the_standard(weights, full_range):
    """Within three levels of ITU-T H.273 in float64, on any processor: up to three products are rounded down."""
    rng = np.random.default_rng(1)
    colorspace = next(number for number, other in MATRICES.items() if other == weights)
    frame = noise(rng, 64, 96, colorspace, FULL if full_range else LIMITED)
    y, u, v = (np.frombuffer(p, np.uint8).reshape(-1, p.line_size)[:, : p.width].astype(float) for p in frame.planes)
    u, v = (chroma.repeat(2, 0).repeat(2, 1) - 128 for chroma in (u, v))
    luma, u, v = (y, u / 255, v / 255) if full_range else ((y - 16) * 255 / 219, u / 224, v / 224)
    red, blue = weights
    r, b = luma + 2 * (1 - red) * 255 * v, luma + 2 * (1 - blue) * 255 * u
    g = (luma - red * r - blue * b) / (1 - red - blue)
    got = converted(frame, Yuv420ToRgb(red, blue, full_range), 0, 0, np.empty((64, 96, 3), np.uint8))
    assert np.abs(got - np.clip(np.stack([r, g, b], axis=-1), 0, 255)).max() <= 3


# ---- in the reader -------------------------------------------------------------------------------------------------
def boxes_of(frames, region):
    height, width = frames[0].height, frames[0].width
    converter = pixels_of("video", frames[0], "rgb", Region(region, height, width), len(frames))
    for frame in frames:
        converter.add(frame)
    return type(converter).__name__, converter.take()


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuvj420p"])
@pytest.mark.parametrize("color_range", [0, LIMITED, FULL])
@pytest.mark.parametrize("colorspace", [0, 1, 2, 4, 5, 6, 7, 9])
def test_every_kind_of_colours_is_converted_as_a_whole_frame(pixel_format, colorspace, color_range):
    rng = np.random.default_rng(2)
    frames = [noise(rng, 50, 70, colorspace, color_range, pixel_format) for _ in range(11)]
    for top, left, bottom, right in ((0, 0, 50, 70), (3, 5, 30, 41), (49, 69, 50, 70), (7, 0, 8, 33)):
        kind, boxes = boxes_of(frames, (top, left, bottom, right))
        expected = [by_swscale(frame)[top:bottom, left:right] for frame in frames]
        np.testing.assert_array_equal(boxes, expected)
        assert kind == "_Boxes" or not X86


def test_colours_that_are_not_known_are_swscales_business(monkeypatch):
    """As on a processor whose swscale rounds otherwise: whole frames are converted by swscale."""
    frames = [noise(np.random.default_rng(3), 20, 30, 1, LIMITED)]
    monkeypatch.setattr(pixels, "Yuv420ToRgb", lambda red, blue, full_range: Yuv420ToRgb(0.2, 0.2, False))
    pixels._like_swscale.cache_clear()
    kind, boxes = boxes_of(frames, (1, 2, 19, 27))
    pixels._like_swscale.cache_clear()
    assert kind == "_OneByOne"
    np.testing.assert_array_equal(boxes[0], by_swscale(frames[0])[1:19, 2:27])


def test_colours_that_swscale_refuses():
    assert pixels._like_swscale("yuv420p", 8, LIMITED) is None  # YCgCo


# ---- bad input -----------------------------------------------------------------------------------------------------
def test_bad_weights():
    for red, blue in ((0, 0.1), (0.5, 0.5), (-0.1, 0.2), (float("nan"), 0.1)):
        with pytest.raises(ValueError, match="red, blue: expected weights above 0 whose sum is below 1, got "):
            Yuv420ToRgb(red, blue, False)


class TestBadPictures:
    planes = [bytes(8 * 6), bytes(4 * 3), bytes(4 * 3)]  # 8 rows of 6 pixels
    convert = Yuv420ToRgb(0.299, 0.114, False)

    def refuse(self, message, pictures=None, rows=8, top=0, left=0, out=None):
        pictures = [self.planes] if pictures is None else pictures
        out = np.empty((len(pictures), 8, 6, 3), np.uint8) if out is None else out
        with pytest.raises(ValueError, match=message):
            self.convert(pictures, rows, top, left, out)

    def test_a_box_outside_of_a_plane(self):
        self.refuse(r"pictures: expected 8 rows, from 10 on, of at least 6 bytes in plane 0, got 48 bytes", top=2)
        self.refuse(r"pictures: expected 8 rows, from 8 on, of at least 8 bytes in plane 0, got 48 bytes", left=2)
        for short in range(3):
            whole = self.planes[short]
            for levels in (whole[:-1], whole[: len(whole) // 2], b""):
                planes = [levels if at == short else plane for at, plane in enumerate(self.planes)]
                self.refuse(rf"in plane {short}, got {len(levels)} bytes", [self.planes, planes])

    def test_odd_boxes(self):
        message = "rows, top, left: expected even numbers, from 2 and from 0 on, got "
        self.refuse(message + "8, 1, 0", top=1)
        self.refuse(message + "8, 0, -2", left=-2)
        for rows in (-8, 0, 7):
            self.refuse(message + f"{rows}, 0, 0", rows=rows)

    def test_out_of_another_shape_or_layout(self):
        shapes = ((1, 8, 5, 3), (1, 7, 6, 3), (1, 8, 6, 4), (8, 6, 3), (2, 8, 6, 3), (0, 8, 6, 3))
        wrong = [*(np.empty(shape, np.uint8) for shape in shapes), np.empty((1, 8, 12, 3), np.uint8)[:, :, ::2]]
        for out in wrong:
            self.refuse(r"out: expected even sides and adjacent pixels, \[1, H, W, 3\], got shape \[", out=out)
        fixed = np.empty((1, 8, 6, 3), np.uint8)
        fixed.setflags(write=False)
        self.refuse("not writeable", out=fixed)
        with pytest.raises(TypeError):
            self.convert([self.planes], 8, 0, 0, np.empty((1, 8, 6, 3)))

    def test_no_bytes(self):
        for pictures in ([[1, 2, 3]], [self.planes[:2]], [bytes(8)], self.planes, None):
            with pytest.raises(TypeError):
                self.convert(pictures, 8, 0, 0, np.empty((1, 8, 6, 3), np.uint8))

    def test_nothing_to_convert(self):
        for shape in ((1, 0, 6, 3), (1, 8, 0, 3)):
            self.convert([self.planes], 8, 0, 0, np.empty(shape, np.uint8))
        self.convert([], 8, 0, 0, np.empty((0, 8, 6, 3), np.uint8))
