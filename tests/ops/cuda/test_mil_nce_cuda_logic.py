"""The CUDA kernels of mil_nce, executed on the host from their unmodified source (tests/support/cuda_emulation).

Threads are emulated by fibers. The tests find wrong indexing, missing or divergent barriers and reads of unwritten
memory, but not what only hardware shows (memory ordering between warps, speed). tests/ops/test_mil_nce.py runs the same
checks on a GPU if there is one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.cuda_emulation.compile import REPOSITORY
from support.operator_references import (
    LARGER_TILES,
    assert_loss,
    assert_same_loss_by_larger_tiles,
    integers,
    loss_inputs,
    single_key_inputs,
    unit,
)


@pytest.mark.parametrize("same_id", ["positive", "ignore", "negative"])
@pytest.mark.parametrize("self_positive", ["keep", "denominator", "drop_both", "per row"])
def test_loss_in_every_mode(emulated, same_id, self_positive):
    mode = integers(0, 3, 7, seed=20) if self_positive == "per row" else self_positive
    assert_loss(emulated, **loss_inputs(7, 200, 12, 4), same_id=same_id, self_positive=mode)


@pytest.mark.usefixtures("every_order")
def test_loss_in_every_thread_order(emulated):
    assert_loss(emulated, **loss_inputs(35, 150, 20, 3, seed=30))


@pytest.mark.parametrize(
    ("B", "K", "D", "P"), [(1, 1, 1, 1), (1, 64, 129, 2), (33, 65, 3, 5), (70, 31, 260, 1), (2, 8300, 2, 3)]
)
def test_loss_ugly_sizes(emulated, B, K, D, P):
    assert_loss(emulated, **loss_inputs(B, K, D, P, seed=40))


def test_loss_merges_chunks_of_queries(emulated):
    assert_loss(emulated, **loss_inputs(300, 70, 4, 2, seed=50))


def test_info_nce_without_positives_or_ids(emulated):
    assert_loss(emulated, unit(5, 16, seed=60), unit(5, 16, seed=61), unit(90, 16, seed=62))


@pytest.mark.parametrize(("D", "dtype"), [(6, torch.float32), (128, torch.bfloat16), (512, torch.float16)])
@pytest.mark.parametrize("same_id", ["positive", "ignore"])
def test_a_single_key_that_differs_marks_its_tile(emulated, same_id, D, dtype):
    """In a tile without another positive, ignored or empty key, one alone is enough for the way that handles them."""
    inputs = single_key_inputs(18, 1284, D, dtype)
    assert_loss(emulated, **inputs, same_id=same_id, self_positive="denominator")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_narrow_inputs_accumulates_in_float32(emulated, dtype):
    inputs = loss_inputs(6, 130, 24, 3, seed=70)
    inputs |= {name: inputs[name].to(dtype) for name in ("query", "own_key", "memory")}
    assert_loss(emulated, **inputs)


def test_a_cold_temperature_and_long_vectors_do_not_overflow(emulated):
    inputs = loss_inputs(5, 100, 8, 3, seed=80)
    assert_loss(emulated, **inputs, temperature=0.01, tolerance=5e-5)
    inputs["query"] = inputs["query"] * 30  # logits of a few thousand
    assert_loss(emulated, **inputs, temperature=0.01, tolerance=2e-3)


def test_an_empty_memory_loses_nothing_whatever_it_holds(emulated):
    inputs = loss_inputs(4, 66, 5, 2, seed=90)
    inputs["memory_ids"].fill_(-1)
    inputs["memory"].fill_(torch.nan)
    for self_positive in ("keep", "denominator", "drop_both"):
        out = emulated.mil_nce(**inputs, self_positive=self_positive)
        for name in ("loss", "grad_query", "own_coefficient", "grad_memory"):
            assert (out[name] == 0).all(), name


def test_loss_of_a_row_does_not_depend_on_its_batch(emulated):
    inputs = loss_inputs(40, 300, 16, 3, seed=100)
    together = emulated.mil_nce(**inputs)
    rows = {name: inputs[name][11:12] for name in ("query", "own_key", "positives", "query_ids")}
    alone = emulated.mil_nce(**(inputs | rows))
    for name in ("loss", "grad_query", "own_coefficient", "lse_all", "lse_positive"):
        np.testing.assert_array_equal(alone[name].numpy(), together[name][11:12].numpy())


@pytest.mark.parametrize(("B", "K", "D"), LARGER_TILES)
def test_larger_tiles_give_the_same_bits(emulated, B, K, D):
    given = loss_inputs(B, K, D, 3, seed=110)
    given["memory"][given["memory_ids"] == -1] = torch.nan
    assert_same_loss_by_larger_tiles(emulated, **given, same_id="ignore")


def test_larger_tiles_without_ids_give_the_same_bits(emulated):
    given = {name: loss_inputs(40, 8200, 32, 1, seed=120)[name] for name in ("query", "own_key", "memory")}
    assert_same_loss_by_larger_tiles(emulated, **given, temperature=0.01)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernels for the host")
def test_a_positive_outside_the_memory_stops_the_device():
    program = (
        "import torch; from support.cuda_emulation.device import Device; "
        "from support.cuda_emulation.compile import build\n"
        "x = torch.ones(1, 2)\n"
        "Device(build()).mil_nce(x, x, torch.ones(3, 2), torch.tensor([[3]]))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY / "tests", capture_output=True, text=True)
    assert result.returncode < 0 and "a slot outside the memory" in result.stderr
