"""CPR_FAST_CPU_VARIANT selects the variant; one that cannot run raises an error instead of selecting another one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpr_fast import _host

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = _host.build_info()["cpu_variants"]  # best first, comma-separated
ABSENT = [name for name in ("avx512", "avx2") if name not in VARIANTS.split(",")]

IN_FORCE = "from cpr_fast import _host; print(_host.build_info()['cpu_variant'])"
# Importing the operator library raises an error; for callers of the C interface, the kernels return one.
KERNELS = """
import torch
try:
    import cpr_fast.ops
except ValueError as error:
    print(error)
x, slots = torch.ones(1, 2, 4), torch.zeros(2, 1, dtype=torch.int64)
for call in (
    lambda: torch.ops.cpr_fast.cascade_select(x, x, [0], [1], None, None, "fp32"),
    lambda: torch.ops.cpr_fast.mil_nce(x[0], x[0], x[0], slots, None, None, None, "ignore", "keep", 0.1),
    lambda: torch.ops.cpr_fast.tvl1_flow(torch.ones(1, 2, 4, 4), 0.25, 0.15, 0.3, 1, 0.8, 1, 0.01, 1, 1, 5),
):
    try:
        call()
        print("ran")
    except RuntimeError as error:
        print(error)
"""


def output(program: str, variant: str | None) -> list[str]:
    """Returns the lines that a Python program prints if CPR_FAST_CPU_VARIANT is `variant`, or unset."""
    environment = {name: value for name, value in os.environ.items() if name != "CPR_FAST_CPU_VARIANT"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({} if variant is None else {"CPR_FAST_CPU_VARIANT": variant})
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("variant", [None, "", *VARIANTS.split(",")])
def test_the_named_variant_is_in_force(variant):
    assert output(IN_FORCE, variant) == [variant or VARIANTS.split(",")[0]]


@pytest.mark.parametrize("variant", ["portable", "sse", *ABSENT])
def test_a_variant_that_cannot_run_is_an_error(variant):
    text = f"CPR_FAST_CPU_VARIANT: expected a variant that this machine can run ({VARIANTS}), got '{variant}'"
    assert output(KERNELS, variant) == (["ran"] * 3 if variant == "portable" else [text] * 4)
