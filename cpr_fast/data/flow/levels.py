"""Optical flow as 8-bit levels: how it is quantised, and TV-L1 of frame pairs on either device.

Both components are clipped to +-20 pixels and stored as `round((f + 20) * 255 / 40)`, as published: zero motion is 128,
one level is .157 px, rounding errs by half a level (.078 px) at most, .045 px rms.

Letters: P frame pairs, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cpr_fast._host import build_info
from cpr_fast.errors import InputError
from cpr_fast.ops import tvl1_flow

LIMIT = 20.0  # pixels: what is clipped

Compute = Callable[[Tensor], Tensor]  # gray frame pairs, uint8 [P, 2, H, W], to flow, float32 [P, 2, H, W] (u, v)


def quantise(flow: Tensor) -> Tensor:
    """float [...], pixels, to uint8 levels: clipped to +-20, zero = 128."""
    return flow.clamp(-LIMIT, LIMIT).add_(LIMIT).mul_(255 / (2 * LIMIT)).round_().to(torch.uint8)


def dequantise(levels: Tensor) -> Tensor:
    """uint8 levels to float32 pixels: the middle of what `quantise` maps to each level."""
    return levels.float() * (2 * LIMIT / 255) - LIMIT


def pair_flow(pairs: Tensor) -> Tensor:
    """`tvl1_flow` of each pair: uint8 [P, 2, H, W] to float32 [P, 2, H, W]."""
    return tvl1_flow(pairs).squeeze(1)


def batch_pixels(device: torch.device) -> int:
    """Pixels of a batch: of one frame of every pair. On a GPU 771 pairs of 340x256, six for every processor of an H200;
    on the CPU 24 for every thread."""
    return 2**26 if device.type == "cuda" else 2**21 * torch.get_num_threads()


@dataclass(frozen=True)
class FlowSolver:
    """Levels of frame pairs; a pair's do not depend on what it is batched with."""

    device: torch.device
    compute: Compute = pair_flow

    def levels(self, pairs: np.ndarray) -> np.ndarray:
        """Gray frame pairs, uint8 [P, 2, H, W], to quantised flow, uint8 [P, 2, H, W] (u, v)."""
        return quantise(self.compute(torch.from_numpy(pairs).to(self.device))).cpu().numpy()


def flow_device(name: str) -> torch.device:
    """The device of this name, if flow can be computed on it. Raises InputError."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise InputError(f"device: got {name!r}, but torch sees {count} CUDA devices; 'cpu' works everywhere")
        if not build_info()["cuda_architectures"]:
            raise InputError(f"device: got {name!r}, but this build has no CUDA kernels; build with CPR_FAST_CUDA=ON")
    return device
