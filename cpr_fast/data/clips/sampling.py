"""Plans the clips of a run: which frames, crop, flip and colours a clip gets, before anything is decoded.

A plan is a pure function of (seed, epoch, video, clip). The draws come from a counter-based generator (Philox4x32-10,
Salmon et al. 2011), whose counter identifies each draw. Therefore the clips of a video do not depend on the batch size,
the worker or the rank, and a resumed run only needs its step number. RGB and flow share one plan; the colour part
applies to RGB alone.

Letters: N videos, M clips, T frames of a clip, B videos of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from cpr_fast._host import philox_uniform
from cpr_fast.errors import InputError

if TYPE_CHECKING:
    from cpr_fast.config import DataConfig
    from cpr_fast.data.index.index import Index

CENTRE_FRACTION = 224 / 256  # of the short side: the published evaluation crops 224 from frames of short side 256
CROPS = (1, 5, 10)
IIC_FRAME, IIC_SIDE = (128, 171), 112  # IIC resizes a frame to 128x171 and crops 112 of it
CROP_RATIO, CROP_ATTEMPTS = (3 / 4, 4 / 3), 10
JITTER, HUE_DEGREES, SIGMA = 0.4, 36.0, (0.1, 2.0)  # ColorJitter(.4, .4, .4, .1): a hue of .1 is 36 degrees
BASE_P, FLIP_P, JITTER_P, GRAYSCALE_P, BLUR_P = 0.3, 0.5, 0.8, 0.2, 0.5

LABELLED_JITTER_P = 0.3  # probability of jitter in classifier training, which has no grayscale and no blur
TEST_JITTER, TEST_JITTER_P = 0.2, 0.3  # jitter of test clips in the published code; the hue range is that of training

# The independent streams of draws of a video; 0 and 1 are its two clips.
_PAIR_STREAM, _ORDER_STREAM, _LABELLED_STREAM, _TEST_STREAM = 2, 3, 4, 5


@dataclass(frozen=True)
class Sources:
    """The properties of every video of an index that a plan needs, as arrays."""

    num_frames: np.ndarray  # int64 [N], frames that all views have; flow has one less than RGB
    height: np.ndarray  # int64 [N]
    width: np.ndarray  # int64 [N]

    @classmethod
    def of(cls, index: Index, data: DataConfig | None = None) -> Sources:
        """Returns the facts of an index. With `data.flow = "on_the_fly"` every video has flow."""
        computed = data is not None and data.flow == "on_the_fly"
        frames = [video.num_frames - (computed or video.flow_path is not None) for video in index]
        return cls(
            np.array(frames, np.int64),
            np.array([video.height for video in index], np.int64),
            np.array([video.width for video in index], np.int64),
        )


@dataclass(frozen=True)
class Clips:
    """M planned clips. Without augmentation, flip, colour and blur have their neutral values."""

    video: np.ndarray  # int64 [M], position in the index
    start: np.ndarray  # int64 [M], first source frame; if negative, frame 0 replaces the frames before it
    box: np.ndarray  # int64 (IIC: float64) [M, 4], crop (top, left, bottom, right) in source pixels, ends exclusive
    flip: np.ndarray  # bool [M]
    brightness: np.ndarray  # float32 [M], factor
    contrast: np.ndarray  # float32 [M], factor
    saturation: np.ndarray  # float32 [M], factor; 0 is grayscale
    hue: np.ndarray  # float32 [M], degrees
    sigma: np.ndarray  # float32 [M], Gaussian blur in output pixels; 0 is no blur
    crop: np.ndarray  # int64 [M], number of an evaluation crop, 0..9 (see `plan_windows`); 0 in training

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, rows: slice | list[int] | np.ndarray) -> Clips:
        return Clips(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence[Clips]) -> Clips:
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def epoch_order(num_videos: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order in which an epoch visits the videos: a permutation, int64 [N]."""
    draw = _draws(np.arange(num_videos), seed, epoch, _ORDER_STREAM, blocks=1)
    return np.lexsort((draw[:, 1], draw[:, 0])).astype(np.int64)


def step_videos(order: np.ndarray, step: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Returns the videos of one rank's batch, int64 [B]. A global batch is consecutive in `order` and is divided among
    the ranks."""
    begin = (step * world_size + rank) * batch_size
    return order[begin : begin + batch_size]


def plan_pairs(sources: Sources, video: np.ndarray, data: DataConfig, seed: int, epoch: int) -> Clips:
    """Plans the two training clips of each video: all first clips, then all second clips, M = 2 N.

    This is CoCLR's augmentation. With probability 1/2 the clips have different time positions, and each is "base" with
    probability 0.3 and else "null". Otherwise both have the same position, one is base and the other is null. "null" is
    a random resized crop and a flip; "base" adds colour jitter, grayscale and blur. With `data.augment = "none"` clips
    have different positions and a centre crop; with "iic" different positions and a random crop each.
    """
    start, is_base = _positions(sources.num_frames[video], data, seed, epoch, video)
    chances = np.array([JITTER_P, GRAYSCALE_P, BLUR_P])
    clips = [
        _clip(sources, video, start[:, c], is_base[:, [c]] * chances, data, _draws(video, seed, epoch, c, blocks=8))
        for c in (0, 1)
    ]
    return Clips.concatenate(clips)


def plan_first(sources: Sources, video: np.ndarray, data: DataConfig, seed: int, epoch: int) -> Clips:
    """Plans the first training clip of each video alone, M = N: that of `plan_pairs`."""
    return plan_pairs(sources, video, data, seed, epoch)[np.arange(len(video))]


def plan_labelled(sources: Sources, video: np.ndarray, data: DataConfig, seed: int, epoch: int) -> Clips:
    """Plans the training clip of each video for a classifier, M = N: CoCLR's "null" augmentation, and colour jitter
    with probability 0.3. With `data.augment = "none"`: a random position and a centre crop.
    """
    return _single(sources, video, data, seed, epoch, LABELLED_JITTER_P)


def plan_selection(sources: Sources, video: np.ndarray, data: DataConfig, seed: int, epoch: int) -> Clips:
    """Plans the clip of each video with which the published code selects a model: a random position and crop, M = N."""
    clips = _single(sources, video, data, seed, epoch, 0.0)
    return replace(clips, flip=np.zeros(len(clips), bool))


def _single(sources: Sources, video: np.ndarray, data: DataConfig, seed: int, epoch: int, jitter_p: float) -> Clips:
    draw = _draws(video, seed, epoch, _LABELLED_STREAM, blocks=8)
    slack = sources.num_frames[video] - _span(data)
    start = np.where(slack < 0, slack, _below(draw[:, 31], np.maximum(slack, 1)))
    return _clip(sources, video, start, np.array([jitter_p, 0, 0]), data, draw)


def plan_windows(sources: Sources, video: int, data: DataConfig, clips_per_video: int | None, crops: int = 1) -> Clips:
    """Plans the evaluation clips of one video: windows that overlap by half (they start at 0, T/2 - 1, ... times the
    stride), or `clips_per_video` windows at evenly spaced positions. A video shorter than a clip gives one window,
    padded on the left.

    Each window is cut `crops` times: in the centre (1), also in the four corners (5), and all five also flipped (10).
    """
    if crops not in CROPS:
        raise InputError(
            f"--crops: expected 1 (centre), 5 (centre and corners) or 10 (these also flipped), got {crops}"
        )
    slack = int(sources.num_frames[video]) - _span(data)
    if slack <= 0:
        start = np.array([slack])
    elif clips_per_video is None:
        start = np.arange(0, slack + 1, max(1, data.frames // 2 - 1) * data.stride)
    else:
        start = np.linspace(0, slack, clips_per_video).round().astype(np.int64)
    crop = np.tile(np.arange(crops), len(start))
    videos = np.full(len(crop), video, np.int64)
    corner_box = _iic_corner_box if data.augment == "iic" else _corner_box
    box = corner_box(sources.height[videos], sources.width[videos], crop % 5)
    clips = _neutral(videos, start.astype(np.int64).repeat(crops), box)
    return replace(clips, flip=crop >= 5, crop=crop)


def with_test_jitter(clips: Clips, seed: int) -> Clips:
    """Returns the same clips with the colour jitter that the published code keeps at test time; one draw per video."""
    draw = _draws(clips.video, seed, 0, _TEST_STREAM, blocks=2)
    jitter = draw[:, 0] < TEST_JITTER_P
    factor = (1 + np.where(jitter[:, None], TEST_JITTER * (2 * draw[:, 1:4] - 1), 0)).astype(np.float32)
    hue = np.where(jitter, HUE_DEGREES * (2 * draw[:, 4] - 1), 0).astype(np.float32)
    return replace(clips, brightness=factor[:, 0], contrast=factor[:, 1], saturation=factor[:, 2], hue=hue)


def clip_frames(start: int, data: DataConfig) -> np.ndarray:
    """Returns the source frame of each frame of a clip, int64 [T]. Positions before the first frame repeat frame 0."""
    return np.maximum(start + data.stride * np.arange(data.frames, dtype=np.int64), 0)


def _span(data: DataConfig) -> int:
    return (data.frames - 1) * data.stride + 1


def _draws(video: np.ndarray, seed: int, epoch: int, stream: int, blocks: int) -> np.ndarray:
    """Returns uniform draws in [0, 1) for each video, float64 [N, 4 * blocks]."""
    streams = np.empty((len(video), 3), np.uint64)
    streams[:, 0], streams[:, 1], streams[:, 2] = epoch, video, stream
    return philox_uniform(seed % 2**64, streams, blocks)


def _below(draw: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Maps uniform draws to int64 in 0 .. count - 1. Exact for counts below 2^20, because a draw has 32 bits."""
    return np.floor(draw * count).astype(np.int64)


def _positions(
    num_frames: np.ndarray, data: DataConfig, seed: int, epoch: int, video: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the start of both clips, int64 [N, 2], and whether each gets the base augmentation, bool [N, 2]."""
    draw = _draws(video, seed, epoch, _PAIR_STREAM, blocks=2)
    slack = (num_frames - _span(data))[:, None]
    # Uniform in 0 .. slack - 1, as published: the last possible start is drawn only if it is the only one.
    start = np.where(slack < 0, slack, _below(draw[:, :2], np.maximum(slack, 1)))
    if data.augment != "coclr":
        return start, np.zeros(start.shape, bool)
    two_positions = draw[:, 2:3] < 0.5
    first_is_base = draw[:, 3] < 0.5
    is_base = np.where(two_positions, draw[:, 4:6] < BASE_P, np.stack([first_is_base, ~first_is_base], axis=1))
    return np.where(two_positions, start, start[:, :1]), is_base


def _clip(
    sources: Sources, video: np.ndarray, start: np.ndarray, chances: np.ndarray, data: DataConfig, draw: np.ndarray
) -> Clips:
    """Plans one clip per video from its 32 draws, float64 [N, 32]. `chances` are the probabilities of jitter, grayscale
    and blur, [3] or [N, 3]."""
    height, width = sources.height[video], sources.width[video]
    if data.augment == "none":
        return _neutral(video, start, _corner_box(height, width, np.zeros(len(video), np.int64)))
    if data.augment == "iic":
        free = np.array(IIC_FRAME) - IIC_SIDE
        return _neutral(video, start, _iic_box(height, width, _below(draw[:, 28:30], free + 1)))
    jitter, grayscale, blur = (draw[:, 1:4] < chances).T
    factor = 1 + np.where(jitter[:, None], JITTER * (2 * draw[:, 4:7] - 1), 0)  # [N, 3]
    return Clips(
        video=video,
        start=start,
        box=_random_box(height, width, data.crop_area, draw[:, 8:28].reshape(-1, CROP_ATTEMPTS, 2), draw[:, 28:30]),
        flip=draw[:, 0] < FLIP_P,
        brightness=factor[:, 0].astype(np.float32),
        contrast=factor[:, 1].astype(np.float32),
        saturation=np.where(grayscale, 0, factor[:, 2]).astype(np.float32),
        hue=np.where(jitter, HUE_DEGREES * (2 * draw[:, 7] - 1), 0).astype(np.float32),
        sigma=np.where(blur, SIGMA[0] + (SIGMA[1] - SIGMA[0]) * draw[:, 30], 0).astype(np.float32),
        crop=np.zeros(len(video), np.int64),
    )


def _neutral(video: np.ndarray, start: np.ndarray, box: np.ndarray) -> Clips:
    count = len(video)
    one, zero = np.ones(count, np.float32), np.zeros(count, np.float32)
    return Clips(video, start, box, np.zeros(count, bool), one, one, one, zero, zero, np.zeros(count, np.int64))


def _corner_box(height: np.ndarray, width: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Returns squares of 7/8 of the short side, int64 [N, 4]. `place` 0 is the centre; 1 to 4 are top left, top right,
    bottom left, bottom right."""
    side = np.maximum(1, np.round(CENTRE_FRACTION * np.minimum(height, width))).astype(np.int64)
    free_height, free_width = height - side, width - side
    top = np.where(place == 0, free_height // 2, np.where(place >= 3, free_height, 0))
    left = np.where(place == 0, free_width // 2, np.where(place % 2 == 0, free_width, 0))
    return np.stack([top, left, top + side, left + side], axis=1)


def _iic_corner_box(height: np.ndarray, width: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Returns the boxes of `_corner_box` in IIC's resized frames; the centre is rounded as in torchvision."""
    free_height, free_width = np.array(IIC_FRAME) - IIC_SIDE
    rows = np.array([round(free_height / 2), 0, 0, free_height, free_height])
    columns = np.array([round(free_width / 2), 0, free_width, 0, free_width])
    return _iic_box(height, width, np.stack([rows[place], columns[place]], axis=1))


def _iic_box(height: np.ndarray, width: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Returns IIC's crop at `corner` (row, column, [N, 2]) of its resized frame in source pixels, float64 [N, 4]."""
    box = np.concatenate([corner, corner + IIC_SIDE], axis=1)
    return box * np.stack([height, width, height, width], axis=1) / np.tile(IIC_FRAME, 2)


def _random_box(
    height: np.ndarray, width: np.ndarray, smallest: float, attempts: np.ndarray, corner: np.ndarray
) -> np.ndarray:
    """Returns the boxes of torchvision's RandomResizedCrop, int64 [N, 4].

    The first of the `attempts` (draws of area and log ratio, float64 [N, 10, 2]) that fits is placed by `corner`
    (draws, float64 [N, 2]). Where none fits, the box is the largest centred one of an allowed ratio.
    """
    area = (smallest + (1 - smallest) * attempts[..., 0]) * (height * width)[:, None]
    low, high = np.log(CROP_RATIO)
    ratio = np.exp(low + (high - low) * attempts[..., 1])  # width / height
    w, h = np.round(np.sqrt(area * ratio)).astype(np.int64), np.round(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])  # [N, 10]
    first = (np.arange(len(w)), fits.argmax(axis=1))
    some = fits.any(axis=1)
    h = np.where(some, h[first], np.minimum(height, np.round(width / CROP_RATIO[0]).astype(np.int64)))
    w = np.where(some, w[first], np.minimum(width, np.round(height * CROP_RATIO[1]).astype(np.int64)))
    top = np.where(some, _below(corner[:, 0], height - h + 1), (height - h) // 2)
    left = np.where(some, _below(corner[:, 1], width - w + 1), (width - w) // 2)
    return np.stack([top, left, top + h, left + w], axis=1)
