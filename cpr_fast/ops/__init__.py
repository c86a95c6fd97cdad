"""The operators for the CPU and CUDA: positive mining, its loss and optical flow; a module that holds a queue; and the
BatchNorm of the networks.

Each operator is registered as `torch.ops.cpr_fast.*`. The functions have references in plain PyTorch, named `*_ref`;
those of the modules `BatchNorm*` are torch's. Any module may import this package; it imports torch and nothing else.
"""

from pathlib import Path

from .batch_norm import BatchNorm1d, BatchNorm3d
from .cascade_mil_nce import cascade_mil_nce, cascade_mil_nce_ref
from .cascade_select import cascade_select, cascade_select_ref
from .graph.knn_graph import KnnGraph, knn_graph, knn_graph_ref
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
    "KnnGraph",
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
    "cmake_dir",
    "include_dir",
    "knn_graph",
    "knn_graph_ref",
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

_PACKAGE = Path(__file__).resolve().parents[1]


def cmake_dir() -> str:
    """Returns the directory of cpr_fast-config.cmake, which `find_package(cpr_fast)` takes as -Dcpr_fast_DIR."""
    return _existing(_PACKAGE / "lib" / "cmake" / "cpr_fast")


def include_dir() -> str:
    """Returns the directory of the C header cpr_fast.h."""
    return _existing(_PACKAGE / "include")


def _existing(folder: Path) -> str:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: run `pip install .` or `python setup.py build_ext`")
    return str(folder)
