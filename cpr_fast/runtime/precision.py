"""The floating-point precision of forward passes."""

from __future__ import annotations

import torch

from cpr_fast.config import Precision

_AUTOCAST_DTYPE = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Returns the autocast context of a precision; with "fp32" it has no effect."""
    dtype = _AUTOCAST_DTYPE[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
