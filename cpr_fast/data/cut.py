"""Crop and resize of frames that are decoded outside of DALI, before its graph does the rest.

DALI's resize on the CPU takes 36 ms for a clip of 32 frames to 128x128, torch's vectorised one of bytes 1.7 ms (one
Zen 4 core), and is PIL's to a level. Cut where they were decoded, whole frames live for one video only and their memory
is used again: those of a batch were new pages at every step, 7 ms for a clip of 320x240 where a copy takes 0.3.

Letters: M clips, T frames, H x W pixels, S side of the square output.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch.nn.functional import interpolate

from cpr_fast.config import DataConfig
from cpr_fast.data.sampling import IIC_FRAME, IIC_SIDE, Clips


def cut_clips(frames: Iterable[np.ndarray], clips: Clips, view: str, data: DataConfig) -> list[np.ndarray]:
    """Planned clips as `ClipGraph` takes them: M of uint8 [T, H, W, C] -> M of uint8 [T, S, S, 3]."""
    return [cut(pixels, box, view, data) for pixels, box in zip(frames, clips.box, strict=True)]


def cut(frames: np.ndarray, box: np.ndarray, view: str, data: DataConfig) -> np.ndarray:
    """A planned clip's box of its frames: uint8 [T, H, W, C] -> uint8 [T, S, S, 3].

    Flow (u, v) comes out in the published channel order (128, v, u): constant first, as PIL reads their BGR files.
    With `data.augment = "iic"` as published: the whole frame to 128x171, the crop of 112, then to S.
    """
    if data.augment == "iic":
        (height, width), size = IIC_FRAME, frames.shape[1:3]
        top, left = (round(float(edge) * to / side) for edge, to, side in zip(box, (height, width), size, strict=False))
        small = _resized(_channels(frames, view), (height, width), "bilinear")
        crop = small[:, top : top + IIC_SIDE, left : left + IIC_SIDE]
        return _resized(crop, (data.size, data.size), "bilinear")
    top, left, bottom, right = (int(edge) for edge in box)
    return _resized(_channels(frames[:, top:bottom, left:right], view), (data.size, data.size), "bicubic")


def _channels(frames: np.ndarray, view: str) -> np.ndarray:
    if view != "flow":
        return frames
    out = np.full((*frames.shape[:3], 3), 128, np.uint8)
    out[..., 1:] = frames[..., ::-1]
    return out


def _resized(frames: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    if frames.shape[1:3] == size:
        return np.ascontiguousarray(frames)
    channels_last = torch.from_numpy(frames).permute(0, 3, 1, 2)
    small = interpolate(channels_last, size, mode=mode, antialias=True)
    return small.permute(0, 2, 3, 1).contiguous().numpy()
