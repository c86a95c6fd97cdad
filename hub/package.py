"""The operators of cpr_fast for the CPU and CUDA: positive mining, its loss and optical flow; a module that holds a
queue; and BatchNorm modules.

This is the `__init__` of the kernel package that `hub/write.py` writes. Its functions are those of `cpr_fast.ops`.
"""

from . import dlpack
from .batch_norm import BatchNorm1d, BatchNorm3d
from .cascade_mil_nce import cascade_mil_nce, cascade_mil_nce_ref
from .cascade_select import cascade_select, cascade_select_ref
from .mil_nce import mil_nce, mil_nce_ref
from .queue_loss import QueueLoss
from .tvl1_flow import tvl1_flow, tvl1_flow_ref

__all__ = [
    "BatchNorm1d",
    "BatchNorm3d",
    "QueueLoss",
    "cascade_mil_nce",
    "cascade_mil_nce_ref",
    "cascade_select",
    "cascade_select_ref",
    "dlpack",
    "mil_nce",
    "mil_nce_ref",
    "tvl1_flow",
    "tvl1_flow_ref",
]
