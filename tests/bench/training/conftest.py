"""Loads the scripts of bench/, which are no package."""

import importlib.util
import sys
from pathlib import Path

import pytest

TRAINING = Path(__file__).resolve().parents[3] / "bench" / "training"


@pytest.fixture(scope="module")
def training_script():
    """A function that returns the module of a script of bench/training. Its changes of sys.path are undone."""
    path = list(sys.path)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, TRAINING / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.path[:] = path
