"""Every script of bench/training starts as the command that its docstring and its page name."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = [path for path in sorted((Path(__file__).resolve().parents[3] / "bench" / "training").glob("*.py"))
           if "__main__" in path.read_text()]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_starts_as_a_command(script, tmp_path):
    done = subprocess.run([sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script.name}"), done.stderr
