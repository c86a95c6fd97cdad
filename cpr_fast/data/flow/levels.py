"""Optical flow as 8-bit levels: quantisation, and TV-L1 flow of frame pairs on the CPU or a GPU.

Both components are clipped to +-20 pixels and stored as `round((f + 20) * 255 / 40)`, as in the published data. Zero
motion is level 128, and one level is 0.157 pixels. The rounding error is at most half a level (0.078 pixels), and 0.045
pixels rms.

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

LIMIT = 20.0  # pixels: larger motion is clipped

# Gray frame pairs, uint8 [P, 2, H, W] -> flow (u, v) in pixels, float32 [P, 2, H, W].
Compute = Callable[[Tensor], Tensor]


def quantise(flow: Tensor) -> Tensor:
    """Returns flow, float [...] in pixels, as uint8 levels: clipped to +-20 pixels, zero is 128."""
    return flow.clamp(-LIMIT, LIMIT).add_(LIMIT).mul_(255 / (2 * LIMIT)).round_().to(torch.uint8)


def dequantise(levels: Tensor) -> Tensor:
    """Returns uint8 levels as float32 pixels: the middle of the interval that `quantise` maps to each level."""
    return levels.float() * (2 * LIMIT / 255) - LIMIT


def pair_flow(pairs: Tensor) -> Tensor:
    """Computes `tvl1_flow` of each pair: uint8 [P, 2, H, W] -> float32 [P, 2, H, W]."""
    return tvl1_flow(pairs).squeeze(1)


def batch_pixels(device: torch.device) -> int:
    """Returns how many pixels a batch holds, counting one frame of every pair.

    At 340x256 that is 771 pairs on a GPU (six per multiprocessor of an H200) and 24 pairs per thread on the CPU.
    """
    return 2**26 if device.type == "cuda" else 2**21 * torch.get_num_threads()


@dataclass(frozen=True)
class FlowSolver:
    """Computes the levels of frame pairs. Those of a pair do not depend on the other pairs of its batch."""

    device: torch.device
    compute: Compute = pair_flow

    def levels(self, pairs: np.ndarray) -> np.ndarray:
        """Returns the quantised flow (u, v), uint8 [P, 2, H, W], of gray frame pairs, uint8 [P, 2, H, W]."""
        return quantise(self.compute(torch.from_numpy(pairs).to(self.device))).cpu().numpy()


def flow_device(name: str) -> torch.device:
    """Returns the device of this name. Raises InputError if flow cannot be computed on it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: expected 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise InputError(
                f"--device: got {name!r}, but torch sees {count} CUDA {'device' if count == 1 else 'devices'}; "
                "'cpu' works everywhere"
            )
        if not build_info()["cuda_architectures"]:
            raise InputError(
                f"--device: got {name!r}, but this build has no CUDA kernels; build it with CPR_FAST_CUDA=ON"
            )
    return device
