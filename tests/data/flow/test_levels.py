"""Flow as 8-bit levels: the published quantisation, and the devices that can compute flow."""

import numpy as np
import pytest
import torch
from support.data_sets.flow import LEVEL, in_pairs

from cpr_fast.data.flow.levels import dequantise, flow_device, pair_flow, quantise
from cpr_fast.errors import InputError
from cpr_fast.ops import tvl1_flow


def test_quantisation_is_the_published_one():
    flow = torch.tensor([0.0, -0.0, 1e-9, -20, 20, -1e6, 1e6, 19.93, 10, -3.7])
    assert quantise(flow).tolist() == [128, 128, 128, 0, 255, 0, 255, 255, 191, 104]
    everywhere = torch.linspace(-20, 20, 100_001, dtype=torch.float64)
    np.testing.assert_array_equal(quantise(everywhere), np.round((everywhere.numpy() + 20) * 255 / 40))
    assert quantise(torch.zeros(3, 2)).dtype == torch.uint8


def test_quantisation_errs_by_half_a_level_at_most():
    flow = torch.from_numpy(np.random.default_rng(0).uniform(-20, 20, 100_000).astype(np.float32))
    error = dequantise(quantise(flow)) - flow
    assert error.abs().max() < LEVEL / 2 + 1e-5
    assert quantise(dequantise(torch.arange(256, dtype=torch.uint8))).tolist() == list(range(256))


def test_the_real_flow_of_a_batch_is_tvl1s():
    gray = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (4, 20, 30)).astype(np.uint8))
    assert torch.equal(pair_flow(in_pairs(gray)), tvl1_flow(gray))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "--device: expected 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
        ("meta", "expected 'cpu'"),
        ("cuda:99", "--device: got 'cuda:99', but torch sees"),
    ],
)
def test_an_impossible_device_is_named(device, message):
    with pytest.raises(InputError, match=message):
        flow_device(device)
