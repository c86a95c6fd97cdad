"""mil_nce under the sanitizer, in both scans and the gradient to the memory, against float64."""

from __future__ import annotations

import pytest
import torch
from support.operator_references import (
    assert_loss,
    assert_same_loss_by_larger_tiles,
    integers,
    loss_inputs,
    mil_nce_float64,
    normal,
    unit,
)

WIDTHS = {"float32": [20, 129], "bfloat16": [24, 128, 512], "float16": [128]}
# Elements, width, and compute capability of the device: 9.0 multiplies by warpgroups, others by warps.
REGIMES = [(getattr(torch, name), D, 90) for name, widths in WIDTHS.items() for D in widths]
REGIMES += [(torch.bfloat16, 128, 80), (torch.float16, 128, 80)]


def inputs(B: int, K: int, D: int, P: int, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    made = loss_inputs(B, K, D, P, seed=seed)
    return made | {name: made[name].to(dtype) for name in ("query", "own_key", "memory")}


@pytest.mark.parametrize(("dtype", "D", "capability"), REGIMES)
def test_every_scan_and_order(device, dtype, D, capability):
    device.set_capability(capability)
    assert_loss(device, **inputs(35, 135, D, 3, dtype, seed=1))


@pytest.mark.parametrize(
    ("dtype", "D", "capability"), [(torch.float32, 20, 90), (torch.float16, 128, 90), (torch.float16, 128, 80)]
)
@pytest.mark.parametrize("same_id", ["positive", "ignore", "negative"])
def test_every_mode(shuffled, dtype, D, capability, same_id):
    shuffled.set_capability(capability)
    given = inputs(5, 70, D, 4, dtype, seed=2)
    for self_positive in ("keep", "denominator", "drop_both", integers(0, 3, 5, seed=3)):
        assert_loss(shuffled, **given, same_id=same_id, self_positive=self_positive)
    for name in ("positives", "query_ids", "memory_ids"):
        given.pop(name)
        assert_loss(shuffled, **given, same_id=same_id)


@pytest.mark.parametrize(
    ("dtype", "D", "capability"),
    [(torch.float32, 6, 90), (torch.bfloat16, 128, 90), (torch.bfloat16, 128, 80), (torch.bfloat16, 24, 90)],
)
@pytest.mark.parametrize("offset", [0, 1])
def test_rows_on_and_off_a_vector_and_odd_sizes(shuffled, dtype, D, capability, offset):
    shuffled.set_capability(capability)
    shuffled.offset = offset
    for B, K, P in ((1, 1, 1), (33, 65, 5), (2, 31, 70), (97, 66, 2)):
        assert_loss(shuffled, **inputs(B, K, D, P, dtype, seed=4))


@pytest.mark.parametrize(
    ("dtype", "D", "capability"), [(torch.float32, 3, 90), (torch.float16, 128, 90), (torch.float16, 128, 80)]
)
def test_several_chunks_of_queries(shuffled, dtype, D, capability):
    shuffled.set_capability(capability)
    assert_loss(shuffled, **inputs(259, 40, D, 2, dtype, seed=5))


def test_unused_content_of_empty_slots(shuffled):
    for dtype, D, capability in ((torch.float32, 9, 90), (torch.bfloat16, 128, 90), (torch.bfloat16, 128, 80)):
        shuffled.set_capability(capability)
        given = inputs(4, 140, D, 2, dtype, seed=6)
        given["memory"][given["memory_ids"] == -1] = torch.nan
        found = shuffled.mil_nce(**given)
        given["memory"][given["memory_ids"] == -1] = 0
        expected = shuffled.mil_nce(**given)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def entries_of_splits(tiles: int) -> int:
    """Returns the entries of a memory in 128 splits of `tiles` tiles of 64, of which the last is less than a tile."""
    return 128 * 64 * tiles - 64 * (tiles - 1) - 5


@pytest.mark.parametrize("tiles", [2, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "D", "capability"), [(torch.float32, 16, 90), (torch.bfloat16, 128, 90), (torch.bfloat16, 128, 80)]
)
def test_splits_of_several_tiles(device, dtype, D, capability, tiles):
    """Only the first and the last two splits run; the memory is empty elsewhere, and their results are zeros."""
    device.set_capability(capability)
    K = entries_of_splits(tiles)
    span = 64 * tiles
    begin_of_last = (K - 1) // span * span - span
    device.choose_blocks("edges")
    shown = torch.cat([torch.arange(span), torch.arange(begin_of_last, K)])
    small = inputs(5, len(shown), D, 3, dtype, seed=7)
    memory = torch.zeros(K, D, dtype=dtype)
    memory_ids = torch.full((K,), -1)
    memory[shown], memory_ids[shown] = small["memory"], small["memory_ids"]
    positives = torch.where(small["positives"] >= 0, shown[small["positives"]], -1)
    found = device.mil_nce(
        small["query"], small["own_key"], memory, positives, small["query_ids"], memory_ids, backward=False
    )
    loss, grad_query, *_ = mil_nce_float64(**small)
    assert (found["loss"].double() - loss).abs().max() < 2e-5 * max(1, loss.abs().max())
    assert (found["grad_query"].double() - grad_query).abs().max() < 2e-5 * max(1, grad_query.abs().max())


@pytest.mark.parametrize(("B", "D", "tiles"), [(33, 64, 2), (97, 32, 4), (34, 160, 2), (40, 32, 9)])
@pytest.mark.parametrize("same_id", ["ignore", "negative"])
def test_larger_tiles_of_the_loss(device, B, D, tiles, same_id):
    """Only the first and the last two splits run: larger tiles take no fewer than two tiles of keys in a split."""
    device.choose_blocks("edges")
    given = loss_inputs(B, entries_of_splits(tiles), D, 3, seed=8)
    given["memory"][given["memory_ids"] == -1] = torch.nan
    assert_same_loss_by_larger_tiles(device, **given, same_id=same_id)


def test_a_gradient_of_more_than_2_to_the_32_elements(shuffled):
    K, D, B = 33_600_000, 128, 3
    shuffled.choose_blocks("edges")
    memory = shuffled.allocate("memory", (K, D))
    memory[-40:] = normal(40, D, seed=8)
    query, own = unit(B, D, seed=9), unit(B, D, seed=10)
    positives = torch.tensor([[K - 1], [K - 3], [K - 3]])
    found = shuffled.mil_nce(query, own, memory, positives, temperature=1.0, forward=False)["grad_memory"][-33:]
    logits = query.double() @ memory[-33:].double().T  # [B, 33]; both logsumexps are zeros
    weight = torch.exp(logits)
    weight[torch.arange(B), positives[:, 0] - (K - 33)] = 0
    assert (found.double() - weight.T @ query.double()).abs().max() < 1e-5


@pytest.mark.large
@pytest.mark.parametrize(  # all kernels for tensor cores
    ("K", "D", "capability"), [(33_600_000, 128, 90), (33_600_000, 128, 80), (8_400_000, 512, 90)]
)
def test_a_scanned_memory_of_more_than_2_to_the_32_elements(shuffled, K, D, capability):
    """Only the last of 128 splits runs, whose last keys are not empty; the results of the others are zeros."""
    shuffled.set_capability(capability)
    B = 3
    shuffled.choose_blocks("last")
    memory = shuffled.allocate("memory", (K, D), torch.bfloat16)
    memory[-61:] = unit(61, D, seed=11).bfloat16()
    memory_ids = shuffled.allocate("memory_ids", (K,), torch.int64).fill_(-1)
    memory_ids[-61:] = 0
    query, own = unit(B, D, seed=12).bfloat16(), unit(B, D, seed=13).bfloat16()
    positives = torch.tensor([[K - 1], [K - 61], [-1]])
    found = shuffled.mil_nce(query, own, memory, positives, memory_ids=memory_ids, backward=False)
    shown = torch.where(positives >= 0, positives - (K - 61), -1)
    loss, grad_query, *_ = mil_nce_float64(query, own, memory[-61:], shown)
    assert (found["loss"].double() - loss).abs().max() < 2e-5 * loss.abs().max()
    assert (found["grad_query"].double() - grad_query).abs().max() < 2e-5 * grad_query.abs().max()
