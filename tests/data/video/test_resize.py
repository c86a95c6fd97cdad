"""The resize of the host module equals torch's, bit for bit, on every CPU variant."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cpr_fast._host import Resize
from torch.nn.functional import interpolate

from cpr_fast import _host

VARIANTS = _host.build_info()["cpu_variants"].split(",")
# Compares in a process of its own, because the variant is chosen once per process.
COMPARE = """
import sys
import numpy as np
from test_resize import expected, sizes
from cpr_fast._host import Resize
rng = np.random.default_rng(int(sys.argv[1]))
for count, (height, width, channels, to, filter) in enumerate(sizes(rng, int(sys.argv[2]))):
    frames = rng.integers(0, 256, (2, height + 3, width + 5, channels), np.uint8)
    if count % 2:
        frames = np.where(frames > 127, 255, 0).astype(np.uint8)  # sums leave the range of a byte
    box = frames[:, 2 : 2 + height, 4 : 4 + width]
    out = np.empty((2, *to, 3), np.uint8)
    Resize((height, width), to, filter)(box, out)
    assert np.array_equal(out, expected(box, to, filter)), (height, width, channels, to, filter)
"""


def expected(frames: np.ndarray, to: tuple[int, int], filter: str) -> np.ndarray:
    if frames.shape[-1] == 2:  # (u, v) becomes (128, v, u)
        frames = np.stack([np.full_like(frames[..., 0], 128), frames[..., 1], frames[..., 0]], axis=-1)
    pictures = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    if pictures.shape[2:] != to:
        pictures = interpolate(pictures, to, mode=filter, antialias=True)
    return pictures.permute(0, 2, 3, 1).numpy()


def sizes(rng: np.random.Generator, count: int):
    """Yields (height, width, channels, size of the result, filter): enlarged, reduced, of one pixel, of odd sides."""
    sides = [1, 2, 3, 5, 17, 112, 128, 171]
    for _ in range(count):
        height, width = (int(2 ** rng.uniform(0, 8.6)) for _ in range(2))
        to = tuple(int(side) for side in rng.choice([*sides, int(2 ** rng.uniform(0, 7.9))], 2))
        yield height, width, int(rng.integers(2, 4)), to, ("bilinear", "bicubic")[int(rng.integers(2))]


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_torch(variant):
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = os.environ | {"CPR_FAST_CPU_VARIANT": variant, "PYTHONPATH": paths}
    command = [sys.executable, "-c", COMPARE, "0", "60" if variant == "portable" else "150"]
    subprocess.run(command, env=environment, check=True)


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_weights_of_every_side(filter):
    """A weight that is rounded otherwise than torch's shows at the edges of black and white stripes."""
    rng = np.random.default_rng(1)
    for side in range(1, 350):
        frames = (255 * rng.integers(0, 2, (1, side, 8, 3))).astype(np.uint8)
        for to in (112, 128, 224):
            out = np.empty((1, to, 8, 3), np.uint8)
            Resize((side, 8), (to, 8), filter)(frames, out)
            np.testing.assert_array_equal(out, expected(frames, (to, 8), filter), err_msg=f"{side} to {to}")


def test_no_frames_and_the_same_size():
    Resize((4, 5), (2, 2), "bicubic")(np.empty((0, 4, 5, 3), np.uint8), np.empty((0, 2, 2, 3), np.uint8))
    frames = np.random.default_rng(0).integers(0, 256, (3, 9, 7, 3), np.uint8)
    out = np.empty_like(frames)
    Resize((9, 7), (9, 7), "bicubic")(frames, out)
    np.testing.assert_array_equal(out, frames)


def test_bad_sizes_and_filters():
    with pytest.raises(ValueError, match=r"from_size, to_size: expected sides of 1 to 65536 pixels, got 0"):
        Resize((4, 0), (2, 2), "bicubic")
    with pytest.raises(ValueError, match="got 65537"):
        Resize((4, 4), (2, 65537), "bicubic")
    with pytest.raises(ValueError, match="filter: expected bilinear or bicubic, got 'area'"):
        Resize((4, 4), (2, 2), "area")


def test_bad_frames():
    resize, out = Resize((4, 6), (2, 2), "bicubic"), np.empty((1, 2, 2, 3), np.uint8)
    for shape in ((1, 4, 5, 3), (1, 6, 4, 3), (1, 4, 6, 4), (1, 4, 6, 1), (4, 6, 3)):
        with pytest.raises(ValueError, match=r"frames: expected shape \[F, 4, 6, 2 or 3\], got \[" + str(shape[0])):
            resize(np.zeros(shape, np.uint8), out)
    for frames in (np.zeros((1, 4, 12, 3), np.uint8)[:, :, ::2], np.zeros((1, 4, 6, 4), np.uint8)[..., 2:0:-1]):
        with pytest.raises(ValueError, match="frames: expected the pixels of a row to be adjacent in memory"):
            resize(frames, out)
    with pytest.raises(TypeError):
        resize(np.zeros((1, 4, 6, 3), np.float32), out)


def test_bad_out():
    resize, frames = Resize((4, 6), (2, 2), "bicubic"), np.zeros((1, 4, 6, 3), np.uint8)
    wrong = [np.empty(shape, np.uint8) for shape in ((2, 2, 2, 3), (1, 3, 2, 3), (1, 2, 2, 2), (2, 2, 3))]
    for out in (*wrong, np.empty((1, 2, 4, 3), np.uint8)[:, :, ::2]):
        with pytest.raises(ValueError, match=r"out: expected a dense array of shape \[1, 2, 2, 3\], got \["):
            resize(frames, out)
    fixed = np.empty((1, 2, 2, 3), np.uint8)
    fixed.setflags(write=False)
    with pytest.raises(ValueError, match="not writeable"):
        resize(frames, fixed)
    with pytest.raises(TypeError):
        resize(frames, np.empty((1, 2, 2, 3)))
