"""Loads the scripts of bench/, which are no package."""

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
