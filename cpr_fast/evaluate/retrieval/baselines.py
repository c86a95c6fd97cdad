"""Nearest-neighbour baselines without learning: what pixels and raw motion already give away.

They read the same decoded windows as the network and go through the same retrieval. Each is the strongest simple
version of itself, because a weak baseline flatters the method. Letters: N windows, T frames, H x W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cpr_fast.config.pixels import IMAGENET_MEAN, IMAGENET_STD
from cpr_fast.evaluate.features.embedding import Embedding

ZERO_FLOW = 128 / 255  # the grey level that stores no motion
THUMBNAIL = 16  # side of the single frame, pixels


def single_frame(clips: Tensor) -> Tensor:
    """The middle frame as a 16x16 RGB thumbnail, centred per channel: [N, 3, T, H, W] -> [N, 768].

    Cosine similarity of centred thumbnails is normalised cross-correlation: the scene's layout, not its brightness.
    """
    frame = _pixels(clips[:, :, clips.shape[2] // 2])  # [N, 3, H, W]
    thumbnail = F.adaptive_avg_pool2d(frame, THUMBNAIL)
    return (thumbnail - thumbnail.mean((2, 3), keepdim=True)).flatten(1)


def mean_colour(clips: Tensor) -> Tensor:
    """Mean red, green and blue over the clip: [N, 3, T, H, W] -> [N, 3]."""
    return _pixels(clips).mean((2, 3, 4))


def mean_flow(clips: Tensor) -> Tensor:
    """Mean of v, u, |v| and |u| over the clip: flow clips [N, 3, T, H, W], channels (128, v, u) -> [N, 4]."""
    motion = _pixels(clips)[:, 1:] - ZERO_FLOW
    return torch.cat([motion.mean((2, 3, 4)), motion.abs().mean((2, 3, 4))], 1)


def _pixels(clips: Tensor) -> Tensor:
    """Undo the ImageNet normalisation: [N, 3, ...] -> the same, 0..1."""
    shape = (1, 3) + (1,) * (clips.dim() - 2)
    return clips * clips.new_tensor(IMAGENET_STD).view(shape) + clips.new_tensor(IMAGENET_MEAN).view(shape)


# The last word is a key for stored features: a changed function takes a new number.
BASELINES = {
    "single_frame/rgb": Embedding("rgb", single_frame, "cosine", "single_frame 1"),
    "mean_colour/rgb": Embedding("rgb", mean_colour, "euclidean", "mean_colour 1"),
    "mean_flow/flow": Embedding("flow", mean_flow, "euclidean", "mean_flow 1"),
}
