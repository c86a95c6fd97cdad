"""Applies colours, blur, flip and normalisation to cut clips in torch, for a GPU. `finish.py` is for the CPU.

The operations and their order are those of torchvision's ColorJitter and of PIL, with the arithmetic of PIL: float32,
truncated to levels of 0..255 after every operation, and 8 bits for hue and saturation in HSV. Jitter and grayscale give
PIL's levels bit for bit; the blur is exact but for PIL's rounding after each of six passes.

Letters: M clips, T frames, S side of the square picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cpr_fast.config import DataConfig
from cpr_fast.config.pixels import normalisation
from cpr_fast.data.clips.sampling import COLOURS, LUMA, NO_GRAY, ORDERS, Clips


def finish_clips(pixels: Tensor, clips: Clips, view: str, data: DataConfig) -> Tensor:
    """Finishes M planned clips: uint8 [M, T, S, S, 3] -> normalised float32 [M, T, S, S, 3], on the same device.

    Flow is only flipped and normalised, unless `data.flow_colour`.
    """
    mean, std = (torch.tensor(value, device=pixels.device) for value in normalisation(data.augment))
    out = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    for row, levels in enumerate(pixels):
        clip = clips[[row]]
        if view != "flow" or data.flow_colour:
            levels = _coloured(levels.float(), clip)
        torch.sub(levels.flip(2) if clip.flip[0] else levels, 255 * mean, out=out[row])
    return out.div_(255 * std)


def _coloured(frames: Tensor, clip: Clips) -> Tensor:
    """Returns the frames of one planned clip, levels as float32 [T, S, S, 3], with its colours and blur."""
    for operation in ORDERS[clip.order[0]]:
        name = COLOURS[operation]
        factor = float(getattr(clip, name)[0])
        if name == "hue" and factor != 0:
            frames = _hue_shifted(frames, int(factor * 255))
        elif name != "hue" and factor != 1:
            frames = _blended(_OTHER[name](frames), frames, factor)
    frames = _grayed(frames, clip.gray[0])
    sigma = float(clip.sigma[0])
    return _blurred(frames, sigma) if sigma else frames


def _blended(other: Tensor, frames: Tensor, factor: float) -> Tensor:
    """Returns PIL's `Image.blend`, which truncates."""
    return (other + (frames - other) * factor).clamp_(0, 255).floor_()


def _luma(frames: Tensor) -> Tensor:
    """Returns the luma of PIL's `convert("L")`, levels as float32 [T, S, S]."""
    red, green, blue = frames.int().unbind(-1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).float()


def _mean_luma(frames: Tensor) -> Tensor:
    """Returns the rounded mean of the luma of each frame, [T, 1, 1, 1]."""
    return (_luma(frames).mean(dim=(1, 2), dtype=torch.float64) + 0.5).floor().float().view(-1, 1, 1, 1)


# What PIL blends a picture with.
_OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "brightness": lambda frames: frames.new_zeros(()),
    "contrast": _mean_luma,
    "saturation": lambda frames: _luma(frames)[..., None],
}


def _hue_shifted(frames: Tensor, shift: int) -> Tensor:
    """Returns the frames with the hue of PIL's 8-bit HSV increased by `shift`, modulo 256.

    Intermediate results have the types of PIL's C code, float32 or float64, so that they are rounded in the same way.
    """
    red, green, blue = frames.unbind(-1)
    value, chroma = frames.amax(-1), frames.amax(-1) - frames.amin(-1)
    divisor = chroma.clamp(min=1)  # a pixel of chroma 0 is gray, and remains gray
    rc, gc, bc = ((value - channel) / divisor for channel in (red, green, blue))
    green_is_value = torch.where(green == value, 2 + rc.double() - bc, 4 + gc.double() - rc)
    hue = torch.where(red == value, (bc - gc).double(), green_is_value).float()
    hue = torch.floor((hue.double() / 6 + 1).remainder(1).float().double() * 255)
    saturation = torch.floor((chroma / value.clamp(min=1)).double() * 255).float() / 255
    sixth = (hue + shift).remainder(256) * 6 / 255
    sector = sixth.floor()
    fraction = (sixth - sector).float()
    p = _rounded(value * (1 - saturation.double()))
    q = _rounded(value * (1 - (saturation * fraction).double()))
    t = _rounded(value * (1 - saturation * (1 - fraction.double())))
    # which of (value, p, q, t) red, green and blue are, by sector
    columns = torch.tensor([[0, 3, 1], [2, 0, 1], [1, 0, 3], [1, 2, 0], [3, 1, 0], [0, 1, 2]], device=frames.device)
    return torch.stack([value, p, q, t], -1).gather(-1, columns[sector.long() % 6])


def _rounded(levels: Tensor) -> Tensor:
    """Rounds halves up, as C's `round` does; `torch.round` rounds them to even. Returns float32."""
    return (levels + 0.5).floor_().float()


def _grayed(frames: Tensor, gray: np.ndarray) -> Tensor:
    """Returns the frames with the planned channel, or the luma, in all three channels. `gray` is a row of
    `Clips.gray`."""
    if (gray == NO_GRAY).all():
        return frames
    if (gray == LUMA).all():
        return _luma(frames)[..., None].expand_as(frames)
    channel = torch.as_tensor(gray, dtype=torch.long, device=frames.device).view(-1, 1, 1, 1)
    return frames.gather(-1, channel.expand(*frames.shape[:3], 1)).expand_as(frames)


def _blurred(frames: Tensor, sigma: float) -> Tensor:
    """Returns PIL's GaussianBlur: three box blurs in each direction, as one product with a [S, S] matrix."""
    rows, columns = (torch.from_numpy(_blur_matrix(side, sigma)).to(frames) for side in frames.shape[1:3])
    return _rounded(torch.einsum("ij,kl,tjlc->tikc", rows, columns, frames))


def _blur_matrix(side: int, sigma: float) -> np.ndarray:
    """Returns the matrix of the blur of a line of pixels, float64 [S, S]; pixels at the edge are repeated."""
    weights = box_weights(sigma)
    reach = len(weights) // 2
    matrix, pixel = np.zeros((side, side)), np.arange(side)
    for offset, weight in zip(range(-reach, reach + 1), weights, strict=True):
        np.add.at(matrix, (pixel, np.clip(pixel + offset, 0, side - 1)), weight)
    return np.linalg.matrix_power(matrix, 3)


def box_weights(sigma: float) -> np.ndarray:
    """Returns the window of one of the three box blurs by which PIL approximates a Gaussian, float64, of odd length.

    Its outermost weights are fractions of the others, so that three of them together have the variance sigma^2
    (Gwosdek et al., 2011).
    """
    variance = sigma**2 / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    return np.array([edge, *[1.0] * (2 * whole + 1), edge]) / (2 * whole + 1 + 2 * edge)
