"""Applies colours, blur and flip to cut clips on the CPU, with OpenCV. `colour.py` does the same on a GPU.

The operations and their order are those of torchvision's ColorJitter and of PIL, in levels of 0..255 that are rounded
after every operation. Brightness and contrast are PIL's bit for bit, up to the rounding of the frame's mean; saturation
differs by one level, the blur by a few. The hue is a shift in HSV with 8 bits as in PIL, but OpenCV rounds the hue
where PIL truncates it, which is up to ten levels in saturated colours.

Letters: F frames, S side of the square picture.
"""

from __future__ import annotations

import cv2
import numpy as np

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.colour import box_weights
from cpr_fast.data.clips.sampling import LUMA, NO_GRAY, ORDERS, Clips

LUMA_WEIGHTS = (0.299, 0.587, 0.114)


def finish_clip(frames: np.ndarray, clip: Clips, view: str, data: DataConfig) -> None:
    """Applies the colours, blur and flip of one planned clip to its frames, uint8 [F, S, S, 3], in place. Flow is only
    flipped, unless `data.flow_colour`."""
    if view != "flow" or data.flow_colour:
        _jitter(frames, clip)
        for frame, channel in zip(frames, clip.gray[0], strict=False):
            if channel != NO_GRAY:
                one = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) if channel == LUMA else cv2.extractChannel(frame, channel)
                cv2.cvtColor(one, cv2.COLOR_GRAY2RGB, dst=frame)
        _blur(frames, float(clip.sigma[0]))
    if clip.flip[0]:
        for frame in frames:
            cv2.flip(frame, 1, dst=frame)


def _jitter(frames: np.ndarray, clip: Clips) -> None:
    tall = frames.reshape(-1, *frames.shape[2:])  # all frames as one picture
    brightness, contrast, saturation, hue = (
        float(value[0]) for value in (clip.brightness, clip.contrast, clip.saturation, clip.hue)
    )
    for operation in ORDERS[clip.order[0]]:
        if operation == 0 and brightness != 1:
            cv2.LUT(tall, _blended(0, brightness), dst=tall)
        elif operation == 1 and contrast != 1:
            for frame in frames:
                cv2.LUT(frame, _blended(_mean_luma(frame), contrast), dst=frame)
        elif operation == 2 and saturation != 1:
            matrix = saturation * np.eye(3) + (1 - saturation) * np.array(LUMA_WEIGHTS)
            # OpenCV rounds, PIL truncates
            cv2.transform(tall, np.hstack([matrix, np.full((3, 1), -0.499)]), dst=tall)
        elif operation == 3 and hue != 0:
            _shift_hue(tall, hue)


def _blended(other: int, factor: float) -> np.ndarray:
    """Returns PIL's `Image.blend` of a constant picture and each level, uint8 [256]."""
    other, factor = np.float32(other), np.float32(factor)
    return np.clip(other + factor * (np.arange(256, dtype=np.float32) - other), 0, 255).astype(np.uint8)


def _mean_luma(frame: np.ndarray) -> int:
    """Returns the level that PIL's contrast keeps: the rounded mean of the frame's luma."""
    return int(np.dot(cv2.mean(frame)[:3], LUMA_WEIGHTS) + 0.5)


def _shift_hue(picture: np.ndarray, hue: float) -> None:
    hsv = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(hue * 255) % 256)  # wraps, as in torchvision
    cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, dst=picture)


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
