"""mil_nce from the PTX of its kernels: both scans and the gradient to the memory, against float64."""

from __future__ import annotations

import pytest
import torch
from support.operator_references import (
    LARGER_TILES,
    assert_loss,
    assert_same_loss_by_larger_tiles,
    integers,
    loss_inputs,
)

REGIMES = [  # dtype, width, whether the scan uses tensor cores
    (torch.float32, 20, False),
    (torch.float32, 129, False),
    (torch.bfloat16, 24, False),
    (torch.float16, 30, False),
    (torch.bfloat16, 128, True),
    (torch.float16, 128, True),
    (torch.bfloat16, 512, True),
]


def inputs(B: int, K: int, D: int, P: int, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    made = loss_inputs(B, K, D, P, seed=seed)
    return made | {name: made[name].to(dtype) for name in ("query", "own_key", "memory")}


@pytest.mark.parametrize(("dtype", "D", "on_tensor_cores"), REGIMES)
def test_every_scan_with_and_without_positives_by_id(device, dtype, D, on_tensor_cores):
    given = inputs(35, 135, D, 3, dtype, seed=1)
    before = device.products()
    assert_loss(device, **given)
    assert_loss(device, **given, same_id="ignore")
    assert (device.products() > before) == on_tensor_cores


@pytest.mark.parametrize(("dtype", "D"), [(torch.float32, 12), (torch.float16, 128)])
@pytest.mark.parametrize("order", ["backward", "shuffled"])
def test_no_order_of_warps_and_blocks_changes_a_bit(device, dtype, D, order):
    given = inputs(7, 200, D, 4, dtype, seed=2) | {"self_positive": integers(0, 3, 7, seed=20)}
    expected = device.mil_nce(**given)
    device.set_order(order)
    for name, value in device.mil_nce(**given).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("dtype", "D"), [(torch.float32, 2), (torch.bfloat16, 128)])
def test_splits_of_several_tiles_and_chunks_of_queries(device, dtype, D):
    assert_loss(device, **inputs(2, 8300, D, 3, dtype, seed=3))
    assert_loss(device, **inputs(259, 40, D, 2, dtype, seed=4))


def test_info_nce_without_positives_or_ids(device):
    given = inputs(5, 90, 16, 1, torch.float32, seed=5)
    assert_loss(device, given["query"], given["own_key"], given["memory"])


def test_rows_are_read_without_bank_conflicts(device):
    given = inputs(33, 65, 16, 2, torch.float32, seed=6)
    assert_loss(device, **given)
    counts = [c for c in device.counts("mil_nce") if "scan_kernel" in c.function and c.kind == "load shared"]
    assert sum(count.units for count in counts) == sum(count.least for count in counts) > 0


@pytest.mark.parametrize(("B", "K", "D"), LARGER_TILES)
def test_larger_tiles_give_the_same_bits_and_read_without_bank_conflicts(device, B, K, D):
    given = inputs(B, K, D, 2, torch.float32, seed=7)
    assert_same_loss_by_larger_tiles(device, **given, same_id="negative")
    counts = [c for c in device.counts("mil_nce") if "wide_scan_kernel" in c.function and c.kind == "load shared"]
    assert sum(count.units for count in counts) == sum(count.least for count in counts) > 0


def kernels(device, B: int, K: int, dtype: torch.dtype, **limits: int) -> str:
    """Returns the names of the kernels of a loss without ids of width 128, which are not executed."""
    device.reset_counts()
    device.resize(**limits)
    device.set_dry(True)
    device.mil_nce(torch.empty(B, 128, dtype=dtype), torch.empty(B, 128, dtype=dtype),
                   torch.empty(K, 128, dtype=dtype), backward=False)  # fmt: skip
    device.set_dry(False)
    device.resize()
    return " ".join(launch.kernel for launch in device.launches_of("mil_nce"))


def test_larger_tiles_are_used_where_they_keep_no_multiprocessor_longer(device):
    A100, H200 = {"shared_limit": 163 << 10, "processors": 108}, {"processors": 132}
    for B, K, a100, h200 in ((256, 65536, True, True), (128, 65536, False, True), (32, 65536, False, False),
                             (256, 8192, False, False), (256, 16384, True, True)):  # fmt: skip
        assert ("wide_scan_kernel" in kernels(device, B, K, torch.float32, **A100)) == a100, (B, K)
        assert ("wide_scan_kernel" in kernels(device, B, K, torch.float32, **H200)) == h200, (B, K)
    assert "wide_scan_kernel" not in kernels(device, 256, 65536, torch.bfloat16, **H200)
    assert "wide_scan_kernel" not in kernels(device, 256, 65536, torch.float32, shared_limit=99 << 10)


def test_a_positive_outside_the_memory_fails_an_assertion(device):
    x = torch.ones(1, 2)
    with pytest.raises(RuntimeError, match=r"an assertion of the kernel failed .*call.*finish\.cuh:\d+"):
        device.mil_nce(x, x, torch.ones(3, 2), torch.tensor([[3]]))


@pytest.mark.slow
@pytest.mark.parametrize("device", ["90a"], indirect=True)
def test_products_of_warpgroups_and_of_warps_give_the_same_bits(device):
    """The code of sm_90a, on a device of capability 9.0 and on one that has no products of warpgroups."""
    for B, same_id, dtype in ((70, "positive", torch.float16), (5, "ignore", torch.bfloat16)):
        given = inputs(B, 135, 128, 3, dtype, seed=8)
        expected = device.mil_nce(**given, same_id=same_id)
        device.set_capability(80)
        found = device.mil_nce(**given, same_id=same_id)
        device.set_capability(90)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
