"""The operators of cpr_fast for the CPU and CUDA: positive mining, its loss and optical flow; a module that holds a
queue; and BatchNorm modules.

This is the `__init__` of the kernel package that `hub/write.py` writes. Its functions are those of `cpr_fast.ops`.
"""

from . import dlpack
from .batch_norm import BatchNorm1d, BatchNorm3d
from .cascade_mil_nce import cascade_mil_nce, cascade_mil_nce_ref
from .cascade_select import cascade_select, cascade_select_ref
from .mil_nce import mil_nce, mil_nce_ref
from .partial.cascade import (
    cascade_counts,
    cascade_counts_ref,
    cascade_keep,
    cascade_keep_ref,
    cascade_keys,
    cascade_keys_ref,
)
from .partial.mil_nce import (
    mil_nce_merge,
    mil_nce_merge_ref,
    mil_nce_part_entries,
    mil_nce_partial,
    mil_nce_partial_ref,
)
from .partial.sharded import Shard, sharded_cascade_select, sharded_mil_nce
from .queue_loss import QueueLoss
from .tvl1_flow import tvl1_flow, tvl1_flow_ref

__all__ = [
    "BatchNorm1d",
    "BatchNorm3d",
    "QueueLoss",
    "Shard",
    "cascade_counts",
    "cascade_counts_ref",
    "cascade_keep",
    "cascade_keep_ref",
    "cascade_keys",
    "cascade_keys_ref",
    "cascade_mil_nce",
    "cascade_mil_nce_ref",
    "cascade_select",
    "cascade_select_ref",
    "dlpack",
    "mil_nce",
    "mil_nce_merge",
    "mil_nce_merge_ref",
    "mil_nce_part_entries",
    "mil_nce_partial",
    "mil_nce_partial_ref",
    "mil_nce_ref",
    "sharded_cascade_select",
    "sharded_mil_nce",
    "tvl1_flow",
    "tvl1_flow_ref",
]
