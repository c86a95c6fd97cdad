"""The bound on tensor-core scores in cascade_select, with inputs whose errors are as large as the emulated tensor cores
(tests/support/cuda_emulation) can make them: a part of the bound that is a few times too small gives wrong entries.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.operator_references import select_by_sorting


@pytest.fixture
def refined(emulated):
    """The device with limits that select the refined route."""
    emulated.resize(shared_limit=0, cache_size=0)
    yield emulated
    emulated.resize()


def assert_selects(device, queries, memory, keep):
    before = device.products()
    indices, scores = device.cascade_select(queries, memory, [0] * len(keep), keep)
    assert device.products() > before
    expected_indices, expected_scores = select_by_sorting(queries, memory, [0] * len(keep), keep)
    np.testing.assert_array_equal(indices.numpy(), expected_indices)
    np.testing.assert_array_equal(scores.numpy(), expected_scores)


@pytest.mark.parametrize("scale", [1.0, 2.0**-9, 2.0**7])
def test_products_that_tensor_cores_truncate_to_nothing(refined, scale):
    """Each of 4,095 products is just below the last bit of the sum. Tensor cores drop them all, and the canonical chain
    rounds each up to that bit: half of the entries gain by it, the others lose.
    """
    D, unit = 4096, 2.0**-23
    queries = torch.full((1, 1, D), 2.0**-11)
    memory = torch.full((1, 40, D), 0.99 * 2.0**-12)
    memory[0, 20:] *= -1
    queries[..., 0], memory[..., 0] = 1, 1
    memory[0, 20:, 0] += 1.8 * D * unit  # these lead by 1.8 D units on tensor cores, and are behind by 0.2 D
    for order in (torch.arange(40), torch.arange(40).flip(0)):
        assert_selects(refined, queries * scale, memory[:, order] * scale, [20, 7])


@pytest.mark.parametrize("scale", [1.0, 2.0**-9, 2.0**7])
@pytest.mark.parametrize("D", [1, 3])
def test_what_two_terms_of_16_bits_leave_out(refined, D, scale):
    """Scores lie closer together than the products that tensor cores do not compute: of low terms and of remainders."""
    # The high term of a key jumps at 0.5 + 2^-9, and that of 0.7013 is above it: the product of low terms changes sign.
    queries = torch.full((1, 1, D), 0.7013)
    memory = 0.5 + 2.0**-9 + 2e-5 * (torch.rand(1, 1500, D, generator=torch.Generator().manual_seed(2)) - 0.5)
    assert_selects(refined, queries * scale, memory * scale, [750, 740, 40])
