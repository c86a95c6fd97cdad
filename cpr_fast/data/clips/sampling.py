"""Plans the clips of a run: which frames, crop, flip and colours a clip gets, before anything is decoded.

A plan is a pure function of (seed, epoch, video, clip). The draws come from a counter-based generator (Philox4x32-10,
Salmon et al. 2011), whose counter identifies each draw. Therefore the clips of a video do not depend on the batch size,
the worker or the rank, and a resumed run only needs its step number. RGB and flow share one plan.

Letters: N videos, M clips, T frames of a clip, B videos of a batch, A tries of the random crop.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from cpr_fast._host import philox_uniform
from cpr_fast.errors import InputError

if TYPE_CHECKING:
    from cpr_fast.config import DataConfig
    from cpr_fast.data.index.index import Index

# The published evaluation crops 224x224 pixels of frames as they are stored: of short side 240 (UCF101, HMDB51) or 256
# (Kinetics).
TEST_SIDE, STORED_SIDE = 224, 256
CROPS = (1, 5, 10)
IIC_FRAME, IIC_SIDE = (128, 171), 112  # IIC resizes a frame to 128x171 and crops 112 of it
CROP_RATIO = (3 / 4, 4 / 3)
JITTER, HUE, SIGMA = 0.4, 0.1, (0.1, 2.0)  # ColorJitter(.4, .4, .4, .1)
BASE_P, FLIP_P, JITTER_P, GRAYSCALE_P, BLUR_P = 0.3, 0.5, 0.8, 0.2, 0.5
COLOURS = ("brightness", "contrast", "saturation", "hue")
ORDERS = tuple(itertools.permutations(range(4)))  # orders of COLOURS, which ColorJitter shuffles
NO_GRAY, LUMA = -1, 3  # values of `Clips.gray` besides the channels 0, 1, 2

LABELLED_JITTER_P = 0.3  # probability of jitter in classifier training, which has no grayscale and blur
LABELLED_ATTEMPTS = 10  # tries of the random crop in classifier training
TEST_JITTER, TEST_JITTER_P = 0.2, 0.3  # jitter of test clips in the published code; the hue range is that of training

# The independent streams of draws of a video; 0 and 1 are its two clips.
_PAIR_STREAM, _ORDER_STREAM, _LABELLED_STREAM, _TEST_STREAM = 2, 3, 4, 5
_AT_ONCE = 2**16  # videos whose place in an epoch is drawn at the same time

# The columns of the draws of a clip; T columns for the channels of grayscale and 3 A for the crop follow them.
(_FLIP, _CHANCES, _FACTORS, _HUE, _SIGMA, _ORDER, _CORNER,
 _START) = 0, slice(1, 4), slice(4, 7), 7, 8, 9, slice(10, 12), 12  # fmt: skip
_FIXED = 13


@dataclass(frozen=True)
class Sources:
    """The properties of every video of an index that a plan needs, as arrays."""

    # Frames that all views have; flow has one less than RGB. With `data.fps`, the samples of these frames.
    num_frames: np.ndarray  # int32 or int64 [N]
    height: np.ndarray  # int32 or int64 [N]
    width: np.ndarray  # int32 or int64 [N]

    @classmethod
    def of(cls, index: Index, data: DataConfig | None = None) -> Sources:
        """Returns the facts of an index. If `data.flow` is not "stored", every video has flow."""
        return cls(index.shared_frames(data), index.numbers("height"), index.numbers("width"))

    def at(self, video: np.ndarray) -> Sources:
        """Returns the properties of the videos at these positions, int64 [M] each."""
        return Sources(*(column[video].astype(np.int64) for column in (self.num_frames, self.height, self.width)))


@dataclass(frozen=True)
class Clips:
    """M planned clips. Without augmentation, flip, colours and blur have their neutral values.

    The colours are applied in this order: brightness, contrast, saturation and hue as `order` says, gray, blur, flip.
    """

    video: np.ndarray  # int64 [M], position in the index
    # int64 [M], first source frame, or sample of `data.fps`; if negative, frame 0 replaces the frames before it
    start: np.ndarray
    box: np.ndarray  # int64 (IIC: float64) [M, 4], crop (top, left, bottom, right) in source pixels, ends exclusive
    flip: np.ndarray  # bool [M]
    brightness: np.ndarray  # float32 [M], factor
    contrast: np.ndarray  # float32 [M], factor
    saturation: np.ndarray  # float32 [M], factor
    hue: np.ndarray  # float32 [M], shift as a fraction of the colour circle
    order: np.ndarray  # int8 [M], position in ORDERS
    gray: np.ndarray  # int8 [M, T], channel that replaces all three of a frame; LUMA: its luma; NO_GRAY: none
    sigma: np.ndarray  # float32 [M], Gaussian blur in output pixels; 0 is no blur
    crop: np.ndarray  # int64 [M], number of an evaluation crop, 0..9 (see `plan_windows`); 0 in training

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, rows: slice | list[int] | np.ndarray) -> Clips:
        return Clips(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence[Clips]) -> Clips:
        """Returns the clips of all parts, in order."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def epoch_order(num_videos: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order in which an epoch visits the videos: a permutation, int64 [N]."""
    drawn = np.empty(num_videos, np.uint64)
    for begin in range(0, num_videos, _AT_ONCE):
        part = np.arange(begin, min(begin + _AT_ONCE, num_videos))
        words = (_draws(part, seed, epoch, _ORDER_STREAM, blocks=1)[:, :2] * 2.0**32).astype(np.uint64)  # exact
        drawn[part] = words[:, 0] << 32 | words[:, 1]
    return drawn.argsort(kind="stable")


def step_videos(order: np.ndarray, step: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Returns the videos of one rank's batch, int64 [B]. A global batch is consecutive in `order` and is divided among
    the ranks."""
    begin = (step * world_size + rank) * batch_size
    return order[begin : begin + batch_size]


def plan_pairs(sources: Sources, video: np.ndarray, data: DataConfig, seed: int, epoch: int) -> Clips:
    """Plans the two training clips of each video: all first clips, then all second clips, M = 2 N.

    This is CoCLR's augmentation. With probability 1/2 the clips have different time positions, and each is "base" with
    probability 0.3 and else "null". Otherwise both have the same position, one is base and the other is null. "null" is
    a random crop, which keeps the whole frame if it does not fit in `data.crop_attempts` tries, and a flip; "base" adds
    colour jitter, grayscale and blur. With `data.augment = "none"` clips have different positions and a centre crop;
    with "iic" different positions and a random crop each.
    """
    start, is_base = _positions(sources.at(video).num_frames, data, seed, epoch, video)
    chances = np.array([JITTER_P, GRAYSCALE_P, BLUR_P])
    clips = []
    for c in (0, 1):
        draw = _clip_draws(video, data, seed, epoch, c, data.crop_attempts)
        clip = _clip(sources, video, start[:, c], is_base[:, [c]] * chances, data, draw)
        clips.append(clip if data.augment != "coclr" else replace(clip, flip=draw[:, _FLIP] < FLIP_P))
    return Clips.concatenate(clips)


def plan_first(sources: Sources, video: np.ndarray, data: DataConfig, seed: int, epoch: int) -> Clips:
    """Plans only the first training clip of each video, M = N: the same clip as that of `plan_pairs`."""
    return plan_pairs(sources, video, data, seed, epoch)[np.arange(len(video))]


def plan_labelled(sources: Sources, video: np.ndarray, data: DataConfig, seed: int, epoch: int) -> Clips:
    """Plans the training clip of each video for a classifier, M = N: a random position, crop and flip, and with
    probability 0.3 colour jitter. As published, the crop is tried ten times, and where none fits it is the largest
    centred square. The published code flips whole batches; here each clip is drawn. With `data.augment = "none"`: a
    random position and a centre crop.
    """
    return _single(sources, video, data, seed, epoch, jitter_p=LABELLED_JITTER_P, flip_p=FLIP_P)


def plan_selection(sources: Sources, video: np.ndarray, data: DataConfig, seed: int, epoch: int) -> Clips:
    """Plans the clip of each video with which the published code selects a model: a random position and crop, M = N."""
    return _single(sources, video, data, seed, epoch, jitter_p=0, flip_p=0)


def _single(
    sources: Sources, video: np.ndarray, data: DataConfig, seed: int, epoch: int, *, jitter_p: float, flip_p: float
) -> Clips:
    draw = _clip_draws(video, data, seed, epoch, _LABELLED_STREAM, LABELLED_ATTEMPTS)
    own = sources.at(video)
    start = _random_start(own.num_frames, data, draw[:, _START])
    square = _square_box(own.height, own.width)
    clips = _clip(sources, video, start, np.array([jitter_p, 0, 0]), data, draw, square)
    return clips if data.augment != "coclr" else replace(clips, flip=draw[:, _FLIP] < flip_p)


def plan_windows(sources: Sources, video: int, data: DataConfig, clips_per_video: int | None, crops: int = 1) -> Clips:
    """Plans the evaluation clips of one video: windows that overlap by half (with a stride s they start every
    T s / 2 - 1 frames), or `clips_per_video` windows at evenly spaced positions. A video of at most T s frames gives
    one window, padded on the left.

    Each window is cut `crops` times: in the centre (1), also in the four corners (5), and all five also flipped (10).
    """
    if crops not in CROPS:
        raise InputError(
            f"--crops: expected 1 (centre), 5 (centre and corners) or 10 (these also flipped), got {crops}"
        )
    frames, span = int(sources.num_frames[video]), data.frames * data.stride
    if frames <= span:
        start = _padded_start(np.array([frames]), data, np.zeros(1, np.int64))
    elif clips_per_video is None:
        start = np.arange(0, frames - span + 1, max(1, span // 2 - 1))
    else:
        start = np.linspace(0, frames - span, clips_per_video)
        start = start if data.augment == "iic" else start.round()  # IIC's code truncates
    crop = np.tile(np.arange(crops), len(start))
    videos = np.full(len(crop), video, np.int64)
    corner_box = _iic_corner_box if data.augment == "iic" else _corner_box
    own = sources.at(videos)
    box = corner_box(own.height, own.width, crop % 5)
    clips = _neutral(videos, start.astype(np.int64).repeat(crops), box, data)
    return replace(clips, flip=crop >= 5, crop=crop)


def with_test_jitter(clips: Clips, identity: np.ndarray, seed: int) -> Clips:
    """Returns the same clips with the colour jitter that the published code keeps at test time.

    `identity` is a number of every video, int64 [N], from which its draws are made. It must not depend on the other
    videos, because processes share the videos and stored features are not computed again.

    All windows of a video have the same jitter. Each of its ten crops has another one: the published code makes a pass
    over the videos for each crop.
    """
    draw = _draws(identity[clips.video], seed, clips.crop, _TEST_STREAM, blocks=2)
    return replace(clips, **_jitter(draw[:, 0] < TEST_JITTER_P, TEST_JITTER, draw[:, 1:4], draw[:, 4], draw[:, 5]))


def clip_frames(start: int, data: DataConfig) -> np.ndarray:
    """Returns the source frame, or sample of `data.fps`, of each frame of a clip, int64 [T]. Positions before the first
    frame repeat frame 0."""
    return np.maximum(start + data.stride * np.arange(data.frames, dtype=np.int64), 0)


def _random_start(num_frames: np.ndarray, data: DataConfig, draw: np.ndarray) -> np.ndarray:
    """Returns random starts of the shape of `draw`, int64; `num_frames` is broadcast to it.

    As published, a clip of stride s spans T s frames, and the start is uniform in 0 .. frames - T s - 1: the last
    possible start is never drawn. A video of at most T s frames is padded, and the first of its frames is random.
    """
    slack = num_frames - data.frames * data.stride
    padded = _padded_start(num_frames, data, _below(draw, np.int64(data.stride)))
    return np.where(slack > 0, _below(draw, np.maximum(slack, 1)), padded)


def _padded_start(num_frames: np.ndarray, data: DataConfig, phase: np.ndarray) -> np.ndarray:
    """Returns the starts, int64, of clips that end with the frames phase, phase + stride, ... of a short video."""
    count = np.minimum(-((phase - num_frames) // data.stride), data.frames)  # of these frames
    return phase - (data.frames - np.maximum(count, 0)) * data.stride


def _draws(video: np.ndarray, seed: int, epoch: int | np.ndarray, stream: int, blocks: int) -> np.ndarray:
    """Returns uniform draws in [0, 1) for each video, float64 [N, 4 * blocks]."""
    streams = np.empty((len(video), 3), np.uint64)
    streams[:, 0], streams[:, 1], streams[:, 2] = epoch, video, stream
    return philox_uniform(seed % 2**64, streams, blocks)


def _clip_draws(video: np.ndarray, data: DataConfig, seed: int, epoch: int, stream: int, attempts: int) -> np.ndarray:
    """Returns the draws of a clip of each video, float64 [N, _FIXED + T + 3 A or more]."""
    return _draws(video, seed, epoch, stream, blocks=-(-(_FIXED + data.frames + 3 * attempts) // 4))


def _below(draw: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Maps uniform draws to int64 in 0 .. count - 1. Exact for counts below 2^20, because a draw has 32 bits."""
    return np.floor(draw * count).astype(np.int64)


def _positions(
    num_frames: np.ndarray, data: DataConfig, seed: int, epoch: int, video: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the start of both clips, int64 [N, 2], and whether each gets the base augmentation, bool [N, 2]."""
    draw = _draws(video, seed, epoch, _PAIR_STREAM, blocks=2)
    start = _random_start(num_frames[:, None], data, draw[:, :2])
    if data.augment != "coclr":
        return start, np.zeros(start.shape, bool)
    two_positions = draw[:, 2:3] < 0.5
    first_is_base = draw[:, 3] < 0.5
    is_base = np.where(two_positions, draw[:, 4:6] < BASE_P, np.stack([first_is_base, ~first_is_base], axis=1))
    return np.where(two_positions, start, start[:, :1]), is_base


def _clip(
    sources: Sources,
    video: np.ndarray,
    start: np.ndarray,
    chances: np.ndarray,
    data: DataConfig,
    draw: np.ndarray,
    otherwise: np.ndarray | None = None,
) -> Clips:
    """Plans one clip per video from its draws of `_clip_draws`, without a flip.

    `chances` are the probabilities of jitter, grayscale and blur, [3] or [N, 3]. `otherwise` is the box where no try of
    the random crop fits, int64 [N, 4]; by default the whole frame.
    """
    own = sources.at(video)
    height, width = own.height, own.width
    if data.augment == "none":
        return _neutral(video, start, _corner_box(height, width, np.zeros(len(video), np.int64)), data)
    if data.augment == "iic":
        free = np.array(IIC_FRAME) - IIC_SIDE
        return _neutral(video, start, _iic_box(height, width, _below(draw[:, _CORNER], free + 1)), data)
    end = _FIXED + data.frames
    attempts = draw[:, end : end + (draw.shape[1] - end) // 3 * 3].reshape(len(video), -1, 3)
    box = _random_box(height, width, data.crop_area, attempts, draw[:, _CORNER], otherwise)
    jitter, grayscale, blur = (draw[:, _CHANCES] < chances).T
    channel = np.full_like(draw[:, _FIXED:end], LUMA)
    if data.grayscale == "channel":
        channel = _below(draw[:, _FIXED:end], np.int64(3))
    sigma = SIGMA[0] + (SIGMA[1] - SIGMA[0]) * draw[:, _SIGMA]
    return replace(
        _neutral(video, start, box, data),
        gray=np.where(grayscale[:, None], channel, NO_GRAY).astype(np.int8),
        sigma=np.where(blur, sigma, 0).astype(np.float32),
        **_jitter(jitter, JITTER, draw[:, _FACTORS], draw[:, _HUE], draw[:, _ORDER]),
    )


def _jitter(
    some: np.ndarray, strength: float, factors: np.ndarray, hue: np.ndarray, order: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns the fields of ColorJitter(strength, strength, strength, .1) for `some` clips, bool [N], and their neutral
    values for the others; from draws of the factors [N, 3], of the hue and of the order [N]."""
    factors = (1 + np.where(some[:, None], strength * (2 * factors - 1), 0)).astype(np.float32)
    return {
        "brightness": factors[:, 0],
        "contrast": factors[:, 1],
        "saturation": factors[:, 2],
        "hue": np.where(some, HUE * (2 * hue - 1), 0).astype(np.float32),
        "order": np.where(some, _below(order, np.int64(len(ORDERS))), 0).astype(np.int8),
    }


def _neutral(video: np.ndarray, start: np.ndarray, box: np.ndarray, data: DataConfig) -> Clips:
    count = len(video)
    one, zero = np.ones(count, np.float32), np.zeros(count, np.float32)
    return Clips(
        video=video,
        start=start,
        box=box,
        flip=np.zeros(count, bool),
        brightness=one,
        contrast=one,
        saturation=one,
        hue=zero,
        order=np.zeros(count, np.int8),
        gray=np.full((count, data.frames), NO_GRAY, np.int8),
        sigma=zero,
        crop=np.zeros(count, np.int64),
    )


def _corner_box(height: np.ndarray, width: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Returns the squares of the published evaluation, int64 [N, 4]: 224 pixels of a frame whose short side is 224 to
    256. Larger frames are cut as if they had been resized to 256, and of smaller ones the square is the short side.

    `place` 0 is the centre; 1 to 4 are top left, top right, bottom left, bottom right.
    """
    short = np.minimum(height, width)
    side = np.round(short * np.minimum(1, TEST_SIDE / np.minimum(short, STORED_SIDE))).astype(np.int64)
    free_height, free_width = height - side, width - side
    top = np.where(place == 0, _half(free_height), np.where(place >= 3, free_height, 0))
    left = np.where(place == 0, _half(free_width), np.where(place % 2 == 0, free_width, 0))
    return np.stack([top, left, top + side, left + side], axis=1)


def _square_box(height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Returns the largest centred squares, int64 [N, 4]."""
    side = np.minimum(height, width)
    top, left = _half(height - side), _half(width - side)
    return np.stack([top, left, top + side, left + side], axis=1)


def _half(free: np.ndarray) -> np.ndarray:
    """Returns the offset of a centred box; a half is rounded to the even number, as in the published code."""
    return np.round(free / 2).astype(np.int64)


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
    height: np.ndarray,
    width: np.ndarray,
    smallest: float,
    attempts: np.ndarray,
    corner: np.ndarray,
    otherwise: np.ndarray | None,
) -> np.ndarray:
    """Returns the boxes of CoCLR's RandomSizedCrop, int64 [N, 4].

    The first of the `attempts` (draws of area, ratio and exchange of the sides, float64 [N, A, 3]) that fits is placed
    by `corner` (draws, float64 [N, 2]). As published, the ratio is uniform and the sides are exchanged half the time,
    which differs little from torchvision's uniform logarithm of the ratio. Where none fits, the box is `otherwise`, by
    default the whole frame.
    """
    area = (smallest + (1 - smallest) * attempts[..., 0]) * (height * width)[:, None]
    ratio = CROP_RATIO[0] + (CROP_RATIO[1] - CROP_RATIO[0]) * attempts[..., 1]
    sides = np.round(np.sqrt([area * ratio, area / ratio])).astype(np.int64)
    w, h = np.where(attempts[..., 2] < 0.5, sides[::-1], sides)  # [N, A] each
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first = (np.arange(len(w)), fits.argmax(axis=1))
    w, h = np.where(fits[first], w[first], width), np.where(fits[first], h[first], height)
    top, left = _below(corner[:, 0], height - h + 1), _below(corner[:, 1], width - w + 1)
    box = np.stack([top, left, top + h, left + w], axis=1)
    return box if otherwise is None else np.where(fits[first][:, None], box, otherwise)
