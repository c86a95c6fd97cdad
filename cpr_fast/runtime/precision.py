"""The precision of forward passes, for everything that trains."""

from __future__ import annotations

import torch

from cpr_fast.config import Precision

_AUTOCAST_DTYPE = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """A context in which torch computes in that precision where it is safe to; "fp32" changes nothing."""
    dtype = _AUTOCAST_DTYPE[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
