"""Copies of the checkout and the distributions that are built from them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
# Files that builds, tests and runs leave behind: at the top of the checkout, in the package, and anywhere.
AT_THE_TOP = {".git", ".venv", "build", "dist", "runs"}
IN_THE_PACKAGE = {"include", "lib"}
ANYWHERE = shutil.ignore_patterns(".*_cache", ".hypothesis", "*.egg-info", "*.so", "__pycache__")


def copy_source(folder: Path) -> Path:
    """Copies the checkout without what builds leave behind; returns the copy."""

    def left_out(directory: str, names: list[str]) -> set[str]:
        here = {str(ROOT): AT_THE_TOP, str(ROOT / "cpr_fast"): IN_THE_PACKAGE}.get(directory, set())
        return ANYWHERE(directory, names) | here & set(names)

    return Path(shutil.copytree(ROOT, folder, ignore=left_out, symlinks=True))


def run(*command, folder: Path, **environment: str) -> str:
    """Runs a command, without CUDA kernels by default, and returns its output. Fails if the command fails."""
    done = attempt(*command, folder=folder, **environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def attempt(*command, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    settings = {"CPR_FAST_CUDA": "OFF", "PYTHONPATH": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment
    return subprocess.run(
        [*map(str, command)], cwd=folder, env=os.environ | settings, capture_output=True, text=True, timeout=1200
    )


def build_sdist(source: Path, out: Path) -> Path:
    """Builds the source distribution by the hook that pip and `python -m build` call."""
    out.mkdir(parents=True, exist_ok=True)
    program = "import sys, build_backend; build_backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", program, out, folder=source)
    (archive,) = out.glob("*.tar.gz")
    return archive


def pip(*arguments, folder: Path, python: Path | str = sys.executable, **environment: str) -> str:
    """Runs pip without dependencies, with the build tools of the environment that runs the tests."""
    return run(python, "-m", "pip", *arguments, "--no-deps", "--no-build-isolation", folder=folder, **environment)
