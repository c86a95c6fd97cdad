"""The operators for the CPU and CUDA: positive mining, its loss and optical flow; and a module that holds a queue.

Each operator is registered as `torch.ops.cpr_fast.*` and has a reference in plain PyTorch, named `*_ref`. Any module
may import this package; it imports torch and nothing else.
"""

from cpr_fast.ops.cascade_select import cascade_select, cascade_select_ref
from cpr_fast.ops.cmake import cmake_dir, include_dir
from cpr_fast.ops.mil_nce import mil_nce, mil_nce_ref
from cpr_fast.ops.queue_loss import QueueLoss
from cpr_fast.ops.tvl1_flow import tvl1_flow, tvl1_flow_ref

__all__ = [
    "QueueLoss",
    "cascade_select",
    "cascade_select_ref",
    "cmake_dir",
    "include_dir",
    "mil_nce",
    "mil_nce_ref",
    "tvl1_flow",
    "tvl1_flow_ref",
]
