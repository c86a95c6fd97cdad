"""Building in one checkout several times: editable installs, with and without CUDA kernels, after files have moved."""

import shutil
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from support.packaging.distribution import copy_source, pip, run

pytestmark = pytest.mark.packaging


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return copy_source(tmp_path_factory.mktemp("a folder") / "source code")


@pytest.fixture(scope="module")
def python(source):
    """A new environment that can also import the packages of the one that runs the tests."""
    folder = source.parent / "environment"
    venv.create(folder, with_pip=True)
    # The setuptools that comes with Python 3.11 is too old, and would hide the outer one.
    run(folder / "bin" / "python", "-m", "pip", "uninstall", "--yes", "setuptools", folder=source)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    return folder / "bin" / "python"


def architectures(source) -> str:
    """Returns the CUDA architectures of the built library, read in a separate process, because a process loads a
    library only
    once.
    """
    program = (
        "import ctypes, torch; library = ctypes.CDLL('cpr_fast/_C.so'); "
        "f = library.cpr_cuda_architectures; f.restype = ctypes.c_char_p; print(f().decode())"
    )
    return run(sys.executable, "-W", "ignore", "-c", program, folder=source).strip()


def test_editable_install(source, python):
    pip("install", "--editable", ".", folder=source, python=python)
    program = "import cpr_fast.ops as ops; print(ops.__file__); print(ops.cmake_dir())"
    for line in run(python, "-W", "ignore", "-c", program, folder=source.parent).splitlines():
        assert Path(line).is_relative_to(source)
    (source / "cpr_fast" / "added.py").write_text("answer = 42\n")
    assert run(python, "-c", "from cpr_fast.added import answer; print(answer)", folder=source.parent).strip() == "42"
    (source / "cpr_fast" / "added.py").unlink()


def test_modules_of_an_earlier_build_are_not_packaged(source):
    moved = source / "cpr_fast" / "moved.py"
    moved.touch()
    for expected in (True, False):
        out = source.parent / f"wheel {expected}"
        pip("wheel", "--wheel-dir", out, ".", folder=source)
        (built,) = out.glob("*.whl")
        with zipfile.ZipFile(built) as archive:
            assert ("cpr_fast/moved.py" in archive.namelist()) == expected
        moved.unlink(missing_ok=True)


def test_switching_between_cpu_and_cuda(source):
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        pytest.skip("needs nvcc")
    for switch, expected in (("OFF", ""), ("ON", "80"), ("OFF", "")):
        run(sys.executable, "setup.py", "build_ext", folder=source, CPR_FAST_CUDA=switch, TORCH_CUDA_ARCH_LIST="8.0")
        assert architectures(source).partition("-")[0] == expected, switch


def test_a_moved_checkout_builds(source):
    """CMake raises an error for the cache of another source directory."""
    moved = source.rename(source.with_name("moved"))
    try:
        run(sys.executable, "setup.py", "build_ext", folder=moved)
        assert architectures(moved) == ""
    finally:
        moved.rename(source)
