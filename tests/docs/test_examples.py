"""Every example runs and prints the right output."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def output(*command) -> str:
    run = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def example(name: str) -> str:
    program = f"import sys, runpy; sys.path.insert(0, '.'); runpy.run_path('examples/{name}', run_name='__main__')"
    return output(sys.executable, "-c", program)


def numbers(pattern: str, text: str) -> list[float]:
    return [float(value) for value in re.findall(pattern, text)]


def assert_learns(printed: str) -> None:
    losses, right = numbers(r"loss ([\d.]+)", printed), numbers(r"(\d+)%", printed)
    assert losses[-1] < losses[0] and right[-1] > 80, printed


def test_plain_torch():
    assert_learns(example("plain_torch.py"))


def test_pytorch_metric_learning():
    pytest.importorskip("pytorch_metric_learning")
    assert_learns(example("metric_learning_memory.py"))


def test_lightning():
    pytest.importorskip("lightning")
    assert_learns(example("lightning_mining.py"))


def test_lightly():
    pytest.importorskip("lightly.loss", exc_type=ImportError)  # it needs torchvision
    first, rest = example("lightly_memory_bank.py").split("\n", 1)
    theirs, ours = re.fullmatch(r"lightly's loss ([\d.]+), fused ([\d.]+)", first).groups()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    assert_learns(rest)


def test_find_package(tmp_path):
    """Tests the library as C++ users get it: installed from the checkout's build, found by CMake, linked and run."""
    build = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None or not (build / "cmake_install.cmake").exists():
        pytest.skip("needs cmake and a build in the checkout (python setup.py build_ext)")
    output(cmake, "--install", build, "--prefix", tmp_path / "prefix", "--component", "cpp")
    output(cmake, "-S", "examples/cpp", "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    output(cmake, "--build", tmp_path / "build")
    lines = output(tmp_path / "build" / "mine").splitlines()
    assert len(lines) == 4
    for line in lines:
        slots = [int(slot) for slot in line.split("positives")[1].split()]
        assert len(set(slots)) == 5 and all(0 <= slot < 2000 for slot in slots)
        assert numbers(r"loss ([\d.]+)", line)[0] > 0
