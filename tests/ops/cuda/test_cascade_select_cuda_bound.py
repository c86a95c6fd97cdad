"""The bound on tensor-core scores in cascade_select, with inputs whose errors are as large as the emulated tensor cores
(tests/support/cuda_emulation) can make them: a part of the bound that is a few times too small gives wrong entries.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.operator_references import select_by_sorting


@pytest.fixture(params=["worst", "A100", "H100"])
def refined(request, emulated):
    """The device with limits that select the streamed route, with every model of tensor cores."""
    emulated.resize(shared_limit=0, cache_size=0)
    emulated.set_tensor_core(request.param)
    yield emulated
    emulated.resize()
    emulated.set_tensor_core("worst")


def assert_selects(device, queries, memory, keep):
    before = device.products()
    indices, scores = device.cascade_select(queries, memory, [0] * len(keep), keep)
    assert device.products() > before
    expected_indices, expected_scores = select_by_sorting(queries.float(), memory.float(), [0] * len(keep), keep)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("column", [0, 4, 30])
def test_the_bound_has_every_feature_of_16_bits(refined, dtype, column):
    """As above. Almost all of a norm is in one feature: without it, the bound would be far below the errors."""
    D, unit = 4096, 2.0**-23
    queries = torch.full((1, 1, D), 2.0**-11)
    memory = torch.full((1, 40, D), 127 / 128 * 2.0**-12)
    memory[0, 20:] *= -1
    queries[..., column], memory[..., column] = 1, 1
    queries[..., column + 1], memory[..., column + 1] = 2.0**-5, 0
    memory[0, 20:, column + 1] = 1.8 * D * unit * 2.0**5
    for order in (torch.arange(40), torch.arange(40).flip(0)):
        assert_selects(refined, queries.to(dtype), memory[:, order].to(dtype), [20, 7])


@pytest.mark.parametrize("scale", [1.0, 2.0**-9, 2.0**7])
@pytest.mark.parametrize("D", [1, 3])
def test_what_two_terms_of_16_bits_leave_out(refined, D, scale):
    """Scores lie closer together than the products that tensor cores do not compute: of low terms and of remainders."""
    # The high term of a key jumps at 0.5 + 2^-9, and that of 0.7013 is above it: the product of low terms changes sign.
    queries = torch.full((1, 1, D), 0.7013)
    memory = 0.5 + 2.0**-9 + 2e-5 * (torch.rand(1, 1500, D, generator=torch.Generator().manual_seed(2)) - 0.5)
    assert_selects(refined, queries * scale, memory * scale, [750, 740, 40])


def tensor_core_sum(device, model: str, products: list[float], dtype=torch.float16) -> float:
    """Returns what one instruction makes of up to 16 products (powers of two), in units of 2^-23 above 1."""
    query, key = torch.zeros(1, 1, 16), torch.zeros(1, 1, 16)
    for k, product in enumerate(products):
        half = int(np.log2(abs(product))) // 2
        query[..., k], key[..., k] = 2.0**half, product / 2.0**half
    device.set_tensor_core(model)
    _, scores = device.cascade_select(query.to(dtype), key.to(dtype), [0], [1], precision=1)
    device.set_tensor_core("worst")
    return (scores.item() - 1) * 2.0**23


@pytest.mark.parametrize(
    ("products", "sums"),
    [  # the terms besides 1, and the results of each model in units of the last bit
        ([2.0**-23], {"worst": 1, "A100": 1, "H100": 1}),
        ([2.0**-24] * 2, {"worst": 0, "A100": 1, "H100": 1}),  # one more bit than a float
        ([2.0**-25] * 4, {"worst": 0, "A100": 0, "H100": 1}),  # two more bits
        ([2.0**-26] * 8, {"worst": 0, "A100": 0, "H100": 0}),
        (
            [2.0**-24] + [2.0**-40] * 7 + [2.0**-24],
            {"worst": 0, "A100": 0, "H100": 1},
        ),  # in different halves of the sixteen
        ([-(2.0**-24)], {"worst": 0, "A100": -0.5, "H100": -0.5}),  # below 1 a float has one more bit
        ([-(2.0**-26)], {"worst": 0, "A100": 0, "H100": 0}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_the_published_models_do_with_bits_below_a_float(emulated, products, sums, dtype):
    found = {model: tensor_core_sum(emulated, model, [1.0, *products], dtype) for model in sums}
    assert found == sums


@pytest.mark.parametrize("model", ["worst", "A100", "H100"])
def test_errors_of_every_model_are_within_the_bound_and_not_far_below(emulated, model):
    """The bound for 16-bit features is 5 D 2^-23 |q| |k|. The worst inputs of the worst model reach a fifth of it, and
    those of an A100 a tenth.
    """
    D, unit = 2048, 2.0**-23
    queries, memory = torch.full((1, 1, D), 2.0**-11), torch.full((1, 1, D), 127 / 128 * 2.0**-12)
    queries[..., 0] = memory[..., 0] = 1
    emulated.set_tensor_core(model)
    _, scores = emulated.cascade_select(queries.bfloat16(), memory.bfloat16(), [0], [1], precision=1)
    emulated.set_tensor_core("worst")
    canonical = 1 + (D - 1) * unit
    share = abs(scores.item() - canonical) / (5 * D * unit * queries.norm() * memory.norm())
    expected = {"worst": 1 / 5, "A100": 1 / 10, "H100": 1 / 20}[model]
    assert expected * 0.95 < share < expected * 1.05
