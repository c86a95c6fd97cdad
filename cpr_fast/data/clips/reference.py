"""Augments clips without DALI: PIL and NumPy, clip by clip, as the published code does.

With `data.exact` this replaces `ClipGraph`. It is slower, and gives the same bits on every machine and device. DALI's
clips are compared with it in `bench/data/decode_parity.py`.

Letters: M clips, T frames, S side of the square output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from cpr_fast.config import DataConfig
from cpr_fast.config.pixels import normalisation
from cpr_fast.data.clips.sampling import COLOURS, IIC_FRAME, IIC_SIDE, LUMA, NO_GRAY, ORDERS, Clips

ENHANCEMENTS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


class ReferenceGraph:
    """The same interface as `ClipGraph`, for frames that are decoded outside of it."""

    def __init__(self, data: DataConfig, views: Sequence[str], *, group: int = 1, clip_major: bool = False) -> None:
        self._data, self._views, self._group, self._clip_major = data, tuple(views), group, clip_major

    def rows(self, clips: int) -> np.ndarray:
        """Returns which input clip each row of the output is, int64 [M]."""
        rows = np.arange(clips).reshape(-1, self._group)
        return (rows.T if self._clip_major else rows).ravel()

    def run(self, clips: Clips, samples: Mapping[str, list[np.ndarray]]) -> dict[str, Tensor]:
        """Returns view -> float32 [M, 3, T, S, S], in channels_last_3d. `samples[view]` holds M clips, uint8 [T, H, W,
        C].
        """
        rows = self.rows(len(clips))
        mean, std = (np.array(value, np.float32) for value in normalisation(self._data.augment))
        out = {}
        with ThreadPoolExecutor(self._data.workers) as pool:
            for view in self._views:
                pictures = pool.map(lambda row, view=view: self._clip(clips[[row]], samples[view][row], view), rows)
                levels = np.stack(list(pictures)).astype(np.float32)  # [M, T, S, S, 3]
                out[view] = torch.from_numpy((levels / 255 - mean) / std).permute(0, 4, 1, 2, 3)
        return out

    def _clip(self, clip: Clips, frames: np.ndarray, view: str) -> np.ndarray:
        """Augments one planned clip: uint8 [T, H, W, C] -> uint8 [T, S, S, 3]."""
        if view == "flow":
            frames = np.stack([np.full_like(frames[..., 0], 128), frames[..., 1], frames[..., 0]], axis=-1)
        cut = self._cut_iic if self._data.augment == "iic" else self._cut
        pictures = [cut(Image.fromarray(frame), clip.box[0]) for frame in frames]
        if view != "flow" or self._data.flow_colour:
            pictures = [_coloured(picture, clip, gray) for picture, gray in zip(pictures, clip.gray[0], strict=True)]
        if clip.flip[0]:
            pictures = [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in pictures]
        return np.stack([np.asarray(picture) for picture in pictures])

    def _cut(self, picture: Image.Image, box: np.ndarray) -> Image.Image:
        top, left, bottom, right = (int(edge) for edge in box)
        size = (self._data.size, self._data.size)
        return picture.crop((left, top, right, bottom)).resize(size, Image.Resampling.BICUBIC)

    def _cut_iic(self, picture: Image.Image, box: np.ndarray) -> Image.Image:
        """Resizes the whole frame to 128x171, crops it, and resizes the crop if `data.size` is another size."""
        height, width = IIC_FRAME
        top = round(float(box[0]) * height / picture.height)
        left = round(float(box[1]) * width / picture.width)
        crop = picture.resize((width, height), Image.Resampling.BILINEAR)
        crop = crop.crop((left, top, left + IIC_SIDE, top + IIC_SIDE))
        size = (self._data.size, self._data.size)
        return crop if crop.size == size else crop.resize(size, Image.Resampling.BILINEAR)


def _coloured(picture: Image.Image, clip: Clips, gray: int) -> Image.Image:
    """Applies torchvision's colour jitter for PIL images, CoCLR's grayscale and PIL's Gaussian blur."""
    for operation in ORDERS[clip.order[0]]:
        name = COLOURS[operation]
        factor = float(getattr(clip, name)[0])
        if name == "hue" and factor != 0:
            picture = _hue_shifted(picture, factor)
        elif name != "hue" and factor != 1:
            picture = ENHANCEMENTS[name](picture).enhance(factor)
    if gray != NO_GRAY:
        picture = Image.merge("RGB", 3 * [picture.convert("L") if gray == LUMA else picture.getchannel(int(gray))])
    if clip.sigma[0]:
        picture = picture.filter(ImageFilter.GaussianBlur(float(clip.sigma[0])))
    return picture


def _hue_shifted(picture: Image.Image, hue: float) -> Image.Image:
    channels = picture.convert("HSV").split()
    shifted = np.asarray(channels[0]) + np.uint8(int(hue * 255) % 256)  # wraps modulo 256, as in torchvision
    return Image.merge("HSV", (Image.fromarray(shifted), *channels[1:])).convert("RGB")
