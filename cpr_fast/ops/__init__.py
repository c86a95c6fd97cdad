"""The operators: mining, loss and optical flow as `torch.ops.cpr_fast.*`, each with a plain-torch twin `*_ref`."""

from cpr_fast.ops.cascade_select import cascade_select, cascade_select_ref
from cpr_fast.ops.mil_nce import mil_nce, mil_nce_ref
from cpr_fast.ops.tvl1_flow import tvl1_flow, tvl1_flow_ref

__all__ = ["cascade_select", "cascade_select_ref", "mil_nce", "mil_nce_ref", "tvl1_flow", "tvl1_flow_ref"]
