"""Clips cut in parts equal clips cut whole."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from support.numbered_videos import clips_at

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.cut import cut_clips, needed_region
from cpr_fast.data.clips.sampling import Clips, Sources, clip_frames, plan_pairs
from cpr_fast.data.video.pixels import Region

DATA = DataConfig(frames=13, size=40)
VIDEO = SimpleNamespace(height=40, width=40)


def noise(frames: int, height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, channels), np.uint8)


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
    for place, number in enumerate(clip_frames(clip.start[0], data)):
        alone = dataclasses.replace(clip, start=np.zeros(1, int), gray=clip.gray[:, [place]])
        one = dataclasses.replace(data, frames=1)
        expected = cut_clips([pixels[[number]]], alone, view, one, whole, finish=True)[0]
        np.testing.assert_array_equal(got[place], expected[0])


def test_colours_and_flips_are_left_to_the_graph():
    clips = clips_at(VIDEO, [0], brightness=0.5, sigma=1.0, flip=True)
    pixels = noise(13, 40, 40)
    cut = cut_clips([pixels], clips, "rgb", DATA, Region.whole(40, 40), finish=False)
    np.testing.assert_array_equal(cut[0], pixels)
