"""Applies colours, blur and flip to cut clips on the CPU, with OpenCV. `colour.py` does the same on a GPU.

The operations and their order are those of torchvision's ColorJitter and of PIL, in levels of 0..255 that are rounded
after every operation. Brightness is PIL's bit for bit; contrast and saturation differ by at most one level, the blur by
a few. The hue is a shift in HSV with 8 bits as in PIL, but OpenCV rounds the hue where PIL truncates it, which is up to
13 levels in saturated colours.

Letters: F frames, S side of the square picture.
"""

from __future__ import annotations

import cv2
import numpy as np

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.colour import box_weights
from cpr_fast.data.clips.sampling import COLOURS, LUMA, NO_GRAY, ORDERS, Clips

LUMA_WEIGHTS = (0.299, 0.587, 0.114)
# OpenCV divides larger pictures (in pixels) among threads that wait actively, beside the loader's own threads.
STRIPE = 2**16


def finish_clip(frames: np.ndarray, clip: Clips, view: str, data: DataConfig) -> None:
    """Applies the colours, blur and flip of one planned clip to its frames, uint8 [F, S, S, 3], in place. Flow is only
    flipped, unless `data.flow_colour`."""
    if view != "flow" or data.flow_colour:
        step = max(1, STRIPE // (frames.shape[1] * frames.shape[2]))
        for begin in range(0, len(frames), step):
            for operation in ORDERS[clip.order[0]]:
                _JITTER[operation](frames[begin : begin + step], float(getattr(clip, COLOURS[operation])[0]))
        if clip.gray[0, 0] != NO_GRAY:
            _gray(frames, clip.gray[0])
        _blur(frames, float(clip.sigma[0]))
    if clip.flip[0]:
        for frame in frames:
            cv2.flip(frame, 1, dst=frame)


# The operations change the frames in place, and do nothing for a neutral factor. PIL truncates to whole levels, and
# OpenCV rounds; DOWN makes both the same.
DOWN = -0.499


def _brightness(frames: np.ndarray, factor: float) -> None:
    if factor != 1:
        cv2.convertScaleAbs(_tall(frames), dst=_tall(frames), alpha=factor, beta=DOWN)


def _contrast(frames: np.ndarray, factor: float) -> None:
    for frame in frames if factor != 1 else ():
        mean = int(np.dot(cv2.mean(frame)[:3], LUMA_WEIGHTS) + 0.5)
        cv2.addWeighted(frame, factor, frame, 0, (1 - factor) * mean + DOWN, dst=frame)


def _saturation(frames: np.ndarray, factor: float) -> None:
    if factor != 1:
        matrix = factor * np.eye(3) + (1 - factor) * np.array(LUMA_WEIGHTS)
        cv2.transform(_tall(frames), np.hstack([matrix, np.full((3, 1), DOWN)]), dst=_tall(frames))


def _hue(frames: np.ndarray, shift: float) -> None:
    if shift != 0:
        hsv = cv2.cvtColor(_tall(frames), cv2.COLOR_RGB2HSV_FULL)
        # Wraps, as in torchvision. Added to whole rows, which NumPy does faster than to a strided channel.
        rows = hsv.reshape(len(hsv), -1)
        rows += np.tile(np.array([int(shift * 255) % 256, 0, 0], np.uint8), hsv.shape[1])
        cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, dst=_tall(frames))


_JITTER = (_brightness, _contrast, _saturation, _hue)  # in the order of COLOURS


def _tall(frames: np.ndarray) -> np.ndarray:
    """Returns all frames as one picture, a view [F S, S, 3]."""
    return frames.reshape(-1, *frames.shape[2:])


def _gray(frames: np.ndarray, channels: np.ndarray) -> None:
    for frame, channel in zip(frames, channels, strict=True):
        one = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) if channel == LUMA else cv2.extractChannel(frame, channel)
        cv2.cvtColor(one, cv2.COLOR_GRAY2RGB, dst=frame)


def _blur(frames: np.ndarray, sigma: float) -> None:
    """Applies PIL's GaussianBlur: three box blurs, which repeat the pixels at the edge."""
    window = box_window(sigma)
    if len(window) == 1:
        return
    for frame in frames:
        for _ in range(3):
            cv2.sepFilter2D(frame, -1, window, window, dst=frame, borderType=cv2.BORDER_REPLICATE)


def box_window(sigma: float) -> np.ndarray:
    """Returns `box_weights` rounded to multiples of 1/256, float32: OpenCV then computes in integers, which takes half
    the time. The window of a sigma of 0, or of nearly 0, is a single 1."""
    weights = box_weights(sigma)
    parts = np.round(256 * weights)
    parts[len(parts) // 2] += 256 - parts.sum()
    return (parts if parts[0] else parts[1:-1]).astype(np.float32) / 256
