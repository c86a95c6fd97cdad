"""A finished run that the tests of runs share, each module with one of its own."""

from __future__ import annotations

import pytest
from support.small_runs import run, settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs the tiny settings from start to end."""
    return run(settings(tmp_path_factory.mktemp("straight") / "run"))
