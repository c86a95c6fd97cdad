"""Explains how clips are cut and augmented, in training and in evaluation.

Letters: T frames of a clip.
"""

from __future__ import annotations

import numpy as np

from cpr_fast.config import Config, DataConfig
from cpr_fast.config.pixels import normalisation
from cpr_fast.data.clips import sampling
from cpr_fast.experiments.explain.section import Section, fraction
from cpr_fast.wording import ordinal

FRAME = (240, 320)  # height and width of UCF101's frames, pixels


def clips(config: Config, fps: float) -> Section:
    """Explains the size of a clip, and which clips of a video a step compares; `fps` is that of the videos, which
    `data.fps` replaces."""
    data, shared = config.data, config.model.shared
    fps = data.fps or fps
    seconds = data.frames * data.stride / fps
    sampled = ", sampled by presentation time" if data.fps else ""
    stride = "consecutive" if data.stride == 1 else f"every {ordinal(data.stride)}"
    rows = [
        (
            "size",
            f"{data.frames} frames, {stride}: {seconds:.2f} s at {fps:g} fps{sampled}; {data.size}x{data.size} pixels",
        )
    ]
    if shared:
        rows.append(("per video", "one clip at a random position, in both views"))
    elif data.augment == "coclr":
        p = fraction(sampling.BASE_P)
        rows.append(("per video", f"two clips; half of the time at two positions, each with colours (p {p}), else at "
                     "the same position, one of them with colours"))  # fmt: skip
    else:
        rows.append(("per video", "two clips at two positions"))
    values = {"frames": data.frames, "stride": data.stride, "size": data.size, "seconds": seconds}
    return Section("Clips", rows, values | {"clips_per_video": 1 if shared else 2})


def augmentation(config: Config) -> Section:
    """Explains the augmentation of training clips, in the order in which it is applied."""
    data = config.data
    steps = {"coclr": _coclr, "iic": _iic, "none": _none}[data.augment](data)
    rows = [("", f"{data.augment}, with the same draws for all frames of a clip and for its views; in order:")]
    rows += [(step["name"], step["text"]) for step in steps]
    mean, std = normalisation(data.augment)
    unit = set(mean) == {0.0} and set(std) == {1.0}
    rows.append(("levels", "0 to 1" if unit else f"(x - mean) / std, mean {mean}, std {std}"))
    values = {step.pop("name"): {key: value for key, value in step.items() if key != "text"} for step in steps}
    return Section("Augmentation", rows, {"augment": data.augment, "steps": values, "mean": mean, "std": std})


def _coclr(data: DataConfig) -> list[dict]:
    low, high = sampling.CROP_RATIO
    attempts = data.crop_attempts
    fails = "the whole frame if it does not fit" if attempts == 1 else "the whole frame if none fits"
    jitter, degrees = fraction(sampling.JITTER), 360 * sampling.HUE
    views = ["rgb", "flow"] if data.flow_colour else ["rgb"]
    where = "RGB and flow" if data.flow_colour else "RGB only"
    gray = {"channel": "one random channel of each frame", "luma": "the luma"}[data.grayscale]
    low_sigma, high_sigma = sampling.SIGMA
    tried = "one try" if attempts == 1 else f"{attempts} tries"
    return [
        {"name": "crop", "p": 1, "area": [data.crop_area, 1], "ratio": [low, high], "tries": attempts,
         "text": f"area {fraction(data.crop_area)} to 1, width / height {low:.2f} to {high:.2f}, {tried}, "
                 f"{fails}; resized to {data.size}x{data.size}, bicubic"},
        {"name": "jitter", "p": sampling.JITTER_P, "views": views, "factor": sampling.JITTER, "hue_degrees": degrees,
         "text": f"p {fraction(sampling.JITTER_P)} (clips with colours; {where}): brightness, contrast, saturation "
                 f"x(1 ± {jitter}), hue ± {degrees:g} degrees, in random order"},
        {"name": "grayscale", "p": sampling.GRAYSCALE_P, "views": views, "how": data.grayscale,
         "text": f"p {fraction(sampling.GRAYSCALE_P)} (clips with colours; {where}): {gray}"},
        {"name": "blur", "p": sampling.BLUR_P, "views": views, "sigma": [low_sigma, high_sigma],
         "text": f"p {fraction(sampling.BLUR_P)} (clips with colours; {where}): Gaussian, "
                 f"sigma {fraction(low_sigma)} to {fraction(high_sigma)} pixels"},
        {"name": "flip", "p": sampling.FLIP_P, "views": ["rgb", "flow"],
         "text": f"p {fraction(sampling.FLIP_P)}, left-right; the sign of horizontal flow is kept"},
    ]  # fmt: skip


def _iic(data: DataConfig) -> list[dict]:
    (height, width), side = sampling.IIC_FRAME, sampling.IIC_SIDE
    text = f"frames resized to {height}x{width}, bilinear; a random {side}x{side} of them"
    resized = "" if data.size == side else f", resized to {data.size}x{data.size}"
    return [{"name": "crop", "p": 1, "frame": [height, width], "side": side, "text": text + resized}]


def _none(data: DataConfig) -> list[dict]:
    return [{"name": "crop", "p": 1, "text": f"the centre, as in tests; resized to {data.size}x{data.size}"}]


def test_clips(config: Config) -> Section:
    """Explains the windows and crops of an evaluation, by those of a long video of UCF101."""
    data = config.data
    height, width = FRAME
    length = 10 * data.frames * data.stride
    source = sampling.Sources(*(np.array([value]) for value in (length, height, width)))
    windows = sampling.plan_windows(source, 0, data, None)
    starts = [int(start) for start in windows.start[:3]]
    top, left, bottom, right = (round(float(edge)) for edge in windows.box[0])
    crop = f"{right - left}x{bottom - top} at the centre of a {width}x{height} frame, to {data.size}x{data.size}"
    if data.augment == "iic":
        (h, w), side = sampling.IIC_FRAME, sampling.IIC_SIDE
        crop = f"{side}x{side} at the centre of frames resized to {h}x{w}"
    rows = [
        ("windows", f"all that start at {', '.join(map(str, starts))}, … (`--clips N`: N evenly spaced)"),
        ("crop", f"{crop}; five or ten with `--crops`"),
    ]
    values = {"starts": starts, "hop": starts[1] - starts[0], "box_320x240": [left, top, right, bottom]}
    return Section("Test clips", rows, values)
