"""Tests bench/gpu_check.sh without a GPU: stand-ins for the programs that it calls show its commands and its report."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("python3", "cmake", "compute-sanitizer", "nvidia-smi", "nvcc")
STAND_IN = """#!/bin/bash
[[ $1 == - ]] && exec {python} "$@"
echo "$(basename "$0") $* FAIL_WITHOUT_CUDA=$FAIL_WITHOUT_CUDA" >>{log}
[[ "$*" != *"$BROKEN"* ]]
"""


@pytest.fixture
def check(tmp_path):
    """Runs the script with every program replaced; returns its exit status, its JSON and the commands that it ran."""
    for name in ("bench/gpu_check.sh", "bench/results/gpu_pending.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for room in ("ops", "models", "pretrain/state"):
        (tmp_path / "tests" / room).mkdir(parents=True)
    log, programs = tmp_path / "log", tmp_path / "programs"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(STAND_IN.format(python=sys.executable, log=log))
        (programs / name).chmod(0o755)

    def run(broken: str = "no such command", mps: bool = False):
        environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "BROKEN": broken}
        environment |= {"OUT": str(tmp_path / "out"), "CUDA_HOME": str(tmp_path / "no_toolkit")}
        environment["CUDA_MPS_PIPE_DIRECTORY"] = str(tmp_path / "mps")
        (tmp_path / "mps").mkdir(exist_ok=True)
        if mps:
            (tmp_path / "mps" / "control").touch()
        script = [shutil.which("bash"), str(tmp_path / "bench/gpu_check.sh")]
        status = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120)
        return status, json.loads((tmp_path / "out" / "gpu_check.json").read_text()), log.read_text()

    return run


def test_every_step_is_given_and_reported(check):
    process, report, commands = check()
    # build/gpu/test_kernels is not there: the pending item that starts it fails, and the report lists that item.
    steps = {step["step"]: step for step in report["steps"]}
    assert {"device", "build", "tests", "training", "bench", "suites"} <= steps.keys()
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        assert f"compute-sanitizer --tool {tool} --error-exitcode 9 build/gpu/test_kernels" in commands
    assert "pytest -q -p no:cacheprovider tests/models tests/ops tests/pretrain/state" in commands
    assert "training_step.py --device cuda" in commands and "compare.py --device cuda" in commands
    assert commands.count("FAIL_WITHOUT_CUDA=1") == len(commands.splitlines())
    assert sum(name.startswith("pending ") for name in (step["step"] for step in report["steps"])) >= 9
    failed = {step["step"] for step in report["steps"] if step["status"]}
    assert report["mps"] is False
    assert failed == {"pending 1"} and process.returncode == 1 and "failed: pending 1 " in process.stdout


def test_a_failing_step_stops_nothing_and_is_named(check):
    process, report, _ = check(broken="racecheck", mps=True)
    statuses = {step["step"]: step["status"] for step in report["steps"]}
    assert statuses["racecheck"] == 1 and statuses["synccheck"] == 0 and statuses["suites"] == 0
    assert process.returncode == 1 and "racecheck" in process.stdout and report["mps"] is True
