"""The tensor-core route of the CUDA kernels of mil_nce, executed on the host (tests/support/cuda_emulation).

16-bit features of width 128 and 512 take this route; test_mil_nce_cuda_logic.py tests the other routes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.operator_references import assert_loss, integers, loss_inputs, mil_nce_float64, unit


def narrow(inputs: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return inputs | {name: inputs[name].to(dtype) for name in ("query", "own_key", "memory")}


@pytest.fixture(params=[80, 90])
def on_tensor_cores(request, emulated):
    """Runs a test on a device whose products are those of warps, and on one that has those of warpgroups. Fails if no
    call took the route under test."""
    emulated.set_capability(request.param)
    before = emulated.products()
    yield
    emulated.set_capability()
    assert emulated.products() > before


@pytest.mark.usefixtures("every_order", "on_tensor_cores")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "K", "D"), [(35, 150, 128), (3, 100, 512)])
def test_tensor_core_loss_in_every_thread_order(emulated, B, K, D, dtype):
    assert_loss(emulated, **narrow(loss_inputs(B, K, D, 3, seed=110), dtype))


@pytest.mark.usefixtures("on_tensor_cores")
@pytest.mark.parametrize("same_id", ["positive", "ignore", "negative"])
@pytest.mark.parametrize("self_positive", ["keep", "denominator", "drop_both", "per row"])
def test_tensor_core_loss_in_every_mode(emulated, same_id, self_positive):
    mode = integers(0, 3, 7, seed=20) if self_positive == "per row" else self_positive
    assert_loss(emulated, **narrow(loss_inputs(7, 140, 128, 4, seed=120)), same_id=same_id, self_positive=mode)


@pytest.mark.usefixtures("on_tensor_cores")
@pytest.mark.parametrize(("B", "K", "D"), [(1, 1, 128), (1, 31, 512), (66, 65, 128), (1, 8200, 128), (2, 300, 512)])
def test_tensor_core_loss_ugly_sizes(emulated, B, K, D):
    assert_loss(emulated, **narrow(loss_inputs(B, K, D, 2, seed=130)))


@pytest.mark.usefixtures("on_tensor_cores")
def test_tensor_core_loss_merges_chunks_of_queries(emulated):
    assert_loss(emulated, **narrow(loss_inputs(260, 40, 128, 2, seed=140)))


@pytest.mark.usefixtures("on_tensor_cores")
def test_tensor_core_info_nce_without_positives_or_ids(emulated):
    assert_loss(emulated, *(unit(n, 128, seed=150 + n).half() for n in (5, 5, 90)))


@pytest.mark.usefixtures("on_tensor_cores")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_near_zero_keeps_its_gradient(emulated, dtype):
    # One entry contributes nearly all of both sums: the rounding of its weight to 16 bits is larger than the gradient.
    inputs = narrow(loss_inputs(4, 80, 128, 1, seed=160), dtype)
    inputs["memory_ids"], inputs["positives"] = torch.arange(80), torch.arange(4)[:, None] + 70
    inputs["query"] = inputs["memory"][70:74].contiguous()
    out = emulated.mil_nce(**inputs, self_positive="drop_both", temperature=0.1)
    loss, grad_query, *_ = mil_nce_float64(**inputs, self_positive="drop_both", temperature=0.1)
    assert loss.max() < 0.05
    assert (out["grad_query"].double() - grad_query).abs().max() < 1e-3 * grad_query.abs().max()


@pytest.mark.usefixtures("on_tensor_cores")
def test_many_small_half_precision_weights_add_up(emulated):
    # Weights near 2^-24 of the largest: without scaling, these would be the smallest numbers of float16.
    memory = torch.zeros(4000, 128)
    memory[0, 0], memory[1:, 1] = 1, 1
    query = torch.zeros(1, 128)
    query[0, 0], query[0, 1] = 1.7, 0.5
    inputs = [t.half() for t in (query, memory[:1], memory)]
    found, truth = emulated.mil_nce(*inputs)["grad_query"][0, 1], mil_nce_float64(*inputs)[1][0, 1]
    assert truth > 5e-4 and abs(found - truth) < 1e-4 * truth


@pytest.mark.usefixtures("on_tensor_cores")
def test_a_cold_temperature_on_tensor_cores(emulated):
    inputs = narrow(loss_inputs(5, 100, 128, 3, seed=170))
    assert_loss(emulated, **inputs, temperature=0.01, tolerance=5e-5)
    inputs["query"] = inputs["query"] * 30
    assert_loss(emulated, **inputs, temperature=0.01, tolerance=2e-3)


@pytest.mark.usefixtures("on_tensor_cores")
def test_empty_slots_of_any_content_on_tensor_cores(emulated):
    inputs = narrow(loss_inputs(4, 140, 128, 2, seed=180))
    empty = inputs["memory_ids"] == -1
    inputs["memory"][empty] = torch.nan
    found = emulated.mil_nce(**inputs)
    inputs["memory"][empty] = 0
    expected = emulated.mil_nce(**inputs)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), value.numpy(), name)
    inputs["memory"][3] = torch.nan  # a non-empty slot
    inputs["memory_ids"][3] = 99
    assert emulated.mil_nce(**inputs)["loss"].isnan().all()


@pytest.mark.usefixtures("on_tensor_cores")
@pytest.mark.parametrize("same_id", ["positive", "ignore"])
def test_ids_that_differ_in_their_upper_half_only(emulated, same_id):
    inputs = narrow(loss_inputs(6, 140, 128, 2, seed=185))
    for name in ("query_ids", "memory_ids"):
        ids = inputs[name]
        ids[ids >= 0] += torch.arange(int((ids >= 0).sum())) % 3 << 32  # a third of the equal ids stay equal
    inputs["memory_ids"][5] = (1 << 32) - 1  # its lower half is that of an empty slot
    assert_loss(emulated, **inputs, same_id=same_id)


@pytest.mark.usefixtures("on_tensor_cores")
@pytest.mark.parametrize("D", [128, 512])
def test_tensor_core_loss_of_a_row_does_not_depend_on_its_batch(emulated, D):
    inputs = narrow(loss_inputs(40, 200, D, 3, seed=190))
    together = emulated.mil_nce(**inputs)
    rows = {name: inputs[name][33:34].contiguous() for name in ("query", "own_key", "positives", "query_ids")}
    alone = emulated.mil_nce(**(inputs | rows))
    for name in ("loss", "grad_query", "own_coefficient", "lse_all", "lse_positive"):
        np.testing.assert_array_equal(alone[name].numpy(), together[name][33:34].numpy())


def test_what_tensor_cores_cannot_take_goes_the_general_way(emulated):
    inputs = narrow(loss_inputs(3, 70, 128, 2, seed=200))
    before = emulated.products()
    memory = torch.zeros(70 * 128 + 1, dtype=torch.bfloat16)[1:].view(70, 128).copy_(inputs["memory"])
    assert_loss(emulated, **(inputs | {"memory": memory}))  # rows that are not aligned to 16 bytes
    emulated.resize(shared_limit=99 << 10)
    assert_loss(emulated, **narrow(loss_inputs(3, 70, 512, 2, seed=210)))  # a device with less shared memory
    emulated.resize()
    assert emulated.products() == before


@pytest.mark.parametrize(
    ("B", "K", "same_id", "dtype"),
    [
        (70, 300, "positive", torch.bfloat16),
        (130, 129, "ignore", torch.float16),
        pytest.param(5, 8300, "positive", torch.bfloat16, marks=pytest.mark.slow),  # splits of two tiles
    ],
)
def test_products_of_warpgroups_and_of_warps_give_the_same_bits(emulated, B, K, same_id, dtype):
    # The tensor cores of an H100 sum both alike, and the scans multiply in the same order.
    inputs = narrow(loss_inputs(B, K, 128, 3, seed=220), dtype)
    emulated.set_tensor_core("H100")
    found = {}
    for capability in (80, 90):
        emulated.set_capability(capability)
        before = emulated.products()
        found[capability] = emulated.mil_nce(**inputs, same_id=same_id, backward=False), emulated.products() - before
    emulated.set_capability()
    emulated.set_tensor_core("worst")
    (by_warps, fewer), (by_warpgroups, more) = found[80], found[90]
    assert fewer < more  # a warpgroup multiplies 64 rows, of which some do not exist
    for name, value in by_warps.items():
        np.testing.assert_array_equal(by_warpgroups[name].numpy(), value.numpy(), name)


@pytest.mark.parametrize("capability", [80, 86, 89, 100, 120])
def test_only_devices_of_capability_9_0_multiply_by_warpgroups(emulated, capability):
    inputs = narrow(loss_inputs(3, 64, 128, 2, seed=230))
    counts = []
    for chosen in (capability, 90):
        emulated.set_capability(chosen)
        before = emulated.products()
        emulated.mil_nce(**inputs, same_id="negative", backward=False)
        counts.append(emulated.products() - before)
    emulated.set_capability()
    tile = 3 * 64 * 128 // 128  # products of 16 rows with 64 keys
    assert counts == [2 * tile, 4 * tile]
