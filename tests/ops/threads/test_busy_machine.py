"""Operators that share their work among threads while other processes use every core.

`OpenMP` is used on an idle machine, and the tests of each operator compare its numbers of threads there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPETE = "import time\nend = time.monotonic() + 150\nwhile time.monotonic() < end: pass"
SCRIPT = Path(__file__).with_name("on_busy_machine.py")


@pytest.fixture(scope="module")
def report() -> dict:
    """What the script printed beside more competing processes than there are cores."""
    competing = [subprocess.Popen([sys.executable, "-c", COMPETE]) for _ in range(os.cpu_count() + 1)]
    try:
        run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    finally:
        for process in competing:
            process.kill()
            process.wait()
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_threads_change_nothing_and_are_not_those_of_openmp(report):
    assert report["alike"]
    assert report["helpers"] == 2  # with the caller, the three that torch.set_num_threads allows


def test_a_forked_process_has_its_own_threads(report):
    assert report["forked"] == [True, True]


def test_several_callers_share_the_threads(report):
    assert report["callers"] == [True] * 4
