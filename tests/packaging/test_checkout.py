"""Building in one checkout several times: editable installs, with and without CUDA kernels, after files have moved."""

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from support.packaging.distribution import attempt, copy_source, pip, run

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


def find_simde() -> bool:
    """Whether the C++ compiler finds the headers of SIMDe."""
    return not subprocess.run(["c++", "-E", "-x", "c++", "-"], input="#include <simde/x86/avx512/types.h>", text=True,
                              capture_output=True).returncode  # fmt: skip


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


def test_emulated_avx512(source):
    """It builds into a checkout only, is never the default, and has the results of the other variants."""
    if not find_simde():
        pytest.skip("needs SIMDe (apt-get install libsimde-dev)")
    run(sys.executable, "setup.py", "build_ext", folder=source, CPR_FAST_EMULATE_AVX512="ON")
    program = (
        "import torch; from cpr_fast import _host, ops; built = _host.build_info()\n"
        "x = torch.arange(600.0).view(1, 20, 30)\n"
        "print(built['cpu_variants'], built['cpu_variant'], built['cpu_variants_emulated'])\n"
        "print(ops.cascade_select(x.sin(), x.cos(), views=[0], keep=[9])[0].tolist())"
    )
    printed = {
        name: run(sys.executable, "-W", "ignore", "-c", program, folder=source, CPR_FAST_CPU_VARIANT=name).splitlines()
        for name in ("", "avx512")
    }
    assert [lines[0] for lines in printed.values()] == [
        "avx2,portable,avx512 avx2 avx512",
        "avx2,portable,avx512 avx512 avx512",
    ]
    assert printed[""][1] == printed["avx512"][1]


def test_emulated_avx512_is_no_wheel(source):
    done = attempt(sys.executable, "setup.py", "build", folder=source, CPR_FAST_EMULATE_AVX512="ON")
    assert done.returncode and "CPR_FAST_EMULATE_AVX512: expected OFF for a wheel, got 'ON'" in done.stderr


def test_emulated_avx512_needs_the_headers_of_simde(source, tmp_path):
    hidden = "-DCMAKE_IGNORE_PATH=/usr/include;/usr/local/include"
    options = (hidden, "-DCPR_FAST_CUDA=OFF", "-DCPR_FAST_PYTHON=OFF", "-DCPR_FAST_EMULATE_AVX512=ON")
    done = attempt("cmake", "-S", source, "-B", tmp_path, *options, folder=source)
    assert done.returncode and "install SIMDe (Debian: libsimde-dev)" in " ".join(done.stderr.split())


def test_a_moved_checkout_builds(source):
    """CMake raises an error for the cache of another source directory."""
    moved = source.rename(source.with_name("moved"))
    try:
        run(sys.executable, "setup.py", "build_ext", folder=moved)
        assert architectures(moved) == ""
    finally:
        moved.rename(source)
