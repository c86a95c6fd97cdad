"""The package as seen by a user of only the operators: imports, types and help()."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import cpr_fast
from cpr_fast import ops


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


@pytest.mark.parametrize("name", ["cascade_select", "mil_nce", "tvl1_flow", "QueueLoss"])
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


@pytest.mark.parametrize("name", ["cascade_select_ref", "mil_nce_ref", "tvl1_flow_ref"])
def test_references_are_documented(name):
    assert inspect.getdoc(getattr(ops, name)).startswith(f"Computes `{name.removesuffix('_ref')}` in plain PyTorch")
