"""Output that nobody reads: pipes that are closed early, and streams that the caller has closed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from support.data_sets.flow import write_video

pytestmark = pytest.mark.usefixtures("signals_as_in_a_terminal")

CPR = f"{sys.executable} -m cpr_fast"


def shell(command):
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["recipes", "explain cpr_ucf101", "index --help", "pretrain --help"])
def test_a_pipe_that_is_closed_early_ends_the_command_silently(command):
    done = shell(f"{CPR} {command} | true; exit ${{PIPESTATUS[0]}}")
    assert done.returncode in (0, 141) and done.stderr == ""


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_change_nothing_but_the_output(tmp_path, closed):
    write_video(tmp_path / "set/A/a.mkv", 18, width=64)
    done = shell(f"{CPR} index {tmp_path}/set --out {tmp_path}/i.csv --json {closed}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "i.csv").read_text().splitlines()[1].startswith("set/A/a.mkv,A,")
    if ">&-" not in closed.replace("2>&-", ""):
        assert json.loads(done.stdout)["videos"] == 1  # what goes to a closed stderr is not mixed into it
    if "2>&-" not in closed:
        assert "decoding: 1/1 files" in done.stderr


@pytest.mark.parametrize("command", ["recipes", "explain cpr_ucf101", "index --help", "index", "nonsense"])
def test_a_terminal_of_another_kind_changes_no_exit_code(command):
    plain = shell(f"{CPR} {command}")
    odd = shell(f"COLUMNS=20 TERM=dumb PYTHONIOENCODING=ascii LC_ALL=C {CPR} {command}")
    assert odd.returncode == plain.returncode and "Traceback" not in odd.stderr
    assert odd.stdout.isascii() and bool(odd.stdout) == bool(plain.stdout)


def test_a_run_whose_progress_nobody_reads_any_more_saves_its_state(tmp_path):
    """`2>&1 | head` of a run: it ends at its next progress line, with a checkpoint."""
    program = (
        "import signal, sys, time\n"
        "from support.small_runs import RandomLoader, INDEX, settings\n"
        "from cpr_fast.pretrain.run.loop import pretrain\nfrom cpr_fast.runtime import progress\n"
        "from cpr_fast.runtime.interrupt import Interrupted\n"
        "progress.FIRST_LINE_S = progress.LINE_INTERVAL_S = 0.0\n"
        f"config = settings({str(tmp_path / 'run')!r}, schedule={{'cycles': [{{'view': 'rgb', 'epochs': 9999}}]}})\n"
        "try: pretrain(config, index=INDEX, make_loader=RandomLoader)\n"
        "except Interrupted as stopped: sys.exit(100 + stopped.signum)\n"
    )
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" -c "$1" 2>&1 | head -1', sys.executable, program],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": "tests:."}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 100 + signal.SIGHUP, done.stderr
    assert (tmp_path / "run/checkpoints/last.pt").exists()
