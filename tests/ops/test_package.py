"""The package as seen by a user of only the operators: imports, types, help(), and the choice of CPU instructions.

CPR_FAST_CPU_VARIANT selects the variant; one that cannot run raises an error instead of selecting another one.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cpr_fast
from cpr_fast import _host, ops

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = _host.build_info()["cpu_variants"]  # best first, comma-separated
ABSENT = [name for name in ("avx512", "avx2") if name not in VARIANTS.split(",")]

IN_FORCE = "from cpr_fast import _host; print(_host.build_info()['cpu_variant'])"
# Importing the operator library raises an error; for callers of the C interface, the kernels return one.
KERNELS = """
import torch
try:
    import cpr_fast.ops
except ImportError as error:
    print(error)
x, slots = torch.ones(1, 2, 4), torch.zeros(2, 1, dtype=torch.int64)
for call in (
    lambda: torch.ops.cpr_fast.cascade_select(x, x, [0], [1], None, None, "fp32"),
    lambda: torch.ops.cpr_fast.mil_nce(x[0], x[0], x[0], slots, None, None, None, "ignore", "keep", 0.1),
    lambda: torch.ops.cpr_fast.cascade_mil_nce(x, x[0], x, [0], [1], 0, None, None, None, "ignore", "keep", 0.1),
    lambda: torch.ops.cpr_fast.tvl1_flow(torch.ones(1, 2, 4, 4), 0.25, 0.15, 0.3, 1, 0.8, 1, 0.01, 1, 1, 5),
    lambda: torch.ops.cpr_fast.batch_norm(x[0], None, None, None, None, 0.0, 1e-5, False),
):
    try:
        call()
        print("ran")
    except RuntimeError as error:
        print(error)
"""


def test_importing_the_operators_imports_torch_and_nothing_else():
    program = (
        "import sys, torch; before = set(sys.modules); import cpr_fast.ops\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - set(sys.stdlib_module_names) - {'cpr_fast', 'torch'}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_the_package_is_typed():
    assert (Path(cpr_fast.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("cascade_select", "mil_nce", "cascade_mil_nce", "tvl1_flow", "QueueLoss", "BatchNorm1d", "BatchNorm3d"),
        *("cascade_keys", "cascade_counts", "cascade_keep", "mil_nce_partial", "mil_nce_merge", "Shard"),
        *("sharded_cascade_select", "sharded_mil_nce", "knn_graph"),
    ],
)
def test_help_has_shapes_and_an_example_that_runs(name):
    import doctest

    documented = getattr(ops, name)
    text = inspect.getdoc(documented)
    assert "Args:" in text and "[" in text and ">>>" in text
    module = {"torch": __import__("torch"), **{n: getattr(ops, n) for n in ops.__all__}}
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder(recurse=False).find(documented, name, globs=module):
        runner.run(test)
    assert runner.failures == 0 and runner.tries > 0


@pytest.mark.parametrize(
    "name",
    [
        *("cascade_select_ref", "mil_nce_ref", "cascade_mil_nce_ref", "tvl1_flow_ref", "cascade_keys_ref"),
        *("cascade_counts_ref", "cascade_keep_ref", "mil_nce_partial_ref", "mil_nce_merge_ref", "knn_graph_ref"),
    ],
)
def test_references_are_documented(name):
    assert inspect.getdoc(getattr(ops, name)).startswith(f"Computes `{name.removesuffix('_ref')}` in plain PyTorch")


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
    assert output(KERNELS, variant) == (["ran"] * 5 if variant == "portable" else [text] * 6)
