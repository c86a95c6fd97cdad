"""The alignment of the workspace that csrc/cpr_fast.h asks for: enough for every route, and checked."""

from __future__ import annotations

import pytest
import torch
from support.flow_references import DEFAULTS, SHORT, moving_texture
from support.operator_references import loss_inputs, normal

CALLS = {
    "cascade_select": lambda device: device.cascade_select(normal(2, 2, 8), normal(2, 601, 8), [0, 1], [600, 590]),
    "mil_nce": lambda device: device.mil_nce(**loss_inputs(3, 70, 12, 3)),
    "tvl1_flow": lambda device: device.tvl1_flow(moving_texture(2, 17, 20, seed=1)[None], DEFAULTS | SHORT),
}


@pytest.mark.parametrize("operator", CALLS)
def test_sixteen_bytes_are_enough_and_less_is_refused(shuffled, operator):
    for limits in ({}, {"shared_limit": 0}, {"shared_limit": 0, "cache_size": 0}):
        if operator == "cascade_select":
            shuffled.resize(**limits)
        shuffled.workspace_offset = 16
        expected = CALLS[operator](shuffled)
        shuffled.workspace_offset = 0
        torch.testing.assert_close(CALLS[operator](shuffled), expected, rtol=0, atol=0)
        shuffled.workspace_offset = 8
        with pytest.raises(RuntimeError, match="workspace: expected an address that is a multiple of 16"):
            CALLS[operator](shuffled)
