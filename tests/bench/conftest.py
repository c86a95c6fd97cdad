"""Loads the scripts of bench/, which are no package."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def bench_script():
    """A function that returns the module of a script, such as "training/study". Its changes of sys.path are undone."""
    path = list(sys.path)

    def load(name):
        spec = importlib.util.spec_from_file_location(Path(name).name, BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.path[:] = path


@pytest.fixture(scope="module")
def measure():
    """The module bench/measure.py, which scripts find on the path."""
    path = list(sys.path)
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module("measure")
    sys.path[:] = path
