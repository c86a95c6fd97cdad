"""Stand-ins for packages that are not dependencies; they record the calls."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

RECORDED = Path(__file__).parents[2] / "support" / "recorded"


@pytest.fixture
def calls(tmp_path, monkeypatch) -> Path:
    """The file of the calls that the stand-ins of wandb and trackio record, here and in child processes."""
    for name in ("wandb", "trackio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "7")  # a writer sets it unless it is set: undone after the test
    monkeypatch.syspath_prepend(str(RECORDED))
    monkeypatch.setenv("PYTHONPATH", str(RECORDED), prepend=os.pathsep)
    monkeypatch.setenv("RECORDED_CALLS", str(tmp_path / "calls.jsonl"))
    yield tmp_path / "calls.jsonl"
    for name in ("wandb", "trackio", "recording"):
        sys.modules.pop(name, None)
