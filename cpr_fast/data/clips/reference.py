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
from cpr_fast.data.clips.sampling import IIC_FRAME, IIC_SIDE, Clips


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
        if clip.flip[0]:
            pictures = [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in pictures]
        if view != "flow":
            pictures = [_coloured(picture, clip) for picture in pictures]
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


def _coloured(picture: Image.Image, clip: Clips) -> Image.Image:
    """Applies torchvision's colour jitter for PIL images and PIL's Gaussian blur, as CoCLR does."""
    enhancements = (ImageEnhance.Brightness, clip.brightness), (ImageEnhance.Contrast, clip.contrast), (
        ImageEnhance.Color, clip.saturation)  # fmt: skip
    for enhance, factor in enhancements:
        if factor[0] != 1:
            picture = enhance(picture).enhance(float(factor[0]))
    if clip.hue[0]:
        hue, saturation, value = picture.convert("HSV").split()
        turned = np.asarray(hue).astype(int) + round(
            float(clip.hue[0]) * 255 / 360
        )  # wraps modulo 256, as in torchvision
        hue = Image.fromarray((turned % 256).astype(np.uint8))
        picture = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if clip.sigma[0]:
        picture = picture.filter(ImageFilter.GaussianBlur(float(clip.sigma[0])))
    return picture
