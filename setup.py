"""A thin driver of CMakeLists.txt, which holds the whole build description.

`python setup.py build_ext` (with or without --inplace) builds into this checkout; `pip install .` builds a wheel.
Environment variables that change the build:

CPR_FAST_CUDA=AUTO|ON|OFF   AUTO: build the CUDA kernels where nvcc is found. ON: fail without nvcc. OFF: never.
CPR_FAST_EMULATE_AVX512=ON  Compile the avx512 variant for AVX2, to test it on any machine (Makefile, test-avx512). Only
                            `build_ext` accepts it: a wheel is refused.
TORCH_CUDA_ARCH_LIST        GPU architectures, for example "8.0;9.0a+PTX". Default: sm_80, 86, 89, 90a, 100 and 120,
                            and the PTX of sm_80 for others.
MAX_JOBS                    number of parallel compilations. Default: number of processors.
CPR_TORCH_ROOT              directory of the torch package to build against. Default: the installed one.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
EMULATE_AVX512 = os.environ.get("CPR_FAST_EMULATE_AVX512") or "OFF"
sys.path.insert(0, str(ROOT))
from build_backend import TORCH, require_setuptools, torch_root  # noqa: E402

require_setuptools()


class CleanBuild(build):
    def run(self) -> None:
        # setuptools packages whatever lies in its build directory, even modules that have since been moved or deleted.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def run(self) -> None:
        in_checkout = self.inplace or "build_ext" in self.distribution.commands
        build = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        if EMULATE_AVX512 != "OFF" and not in_checkout:
            raise SystemExit(
                f"CPR_FAST_EMULATE_AVX512: expected OFF for a wheel, got '{EMULATE_AVX512}'; it is for tests only, "
                "in a checkout (`python setup.py build_ext`)"
            )
        prefix = ROOT if in_checkout else Path(self.build_lib).resolve()
        cmake, configure = configuration(build)
        forget_stale_cache(build, "Ninja" if "Ninja" in configure else "Unix Makefiles")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        for command in (
            configure,
            [cmake, "--build", build, "--parallel", jobs],
            [cmake, "--install", build, "--prefix", prefix, "--component", "python"],
            [cmake, "--install", build, "--prefix", prefix / "cpr_fast", "--component", "cpp"],
        ):
            if subprocess.run(command).returncode:
                raise SystemExit("The build of cpr_fast failed; the messages above give the cause.")

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib, "cpr_fast")
        built = [*package.glob("_*.so"), *package.glob("include/*"), *package.glob("lib/**/*.*")]
        return [str(path) for path in built if path.is_file()]


def configuration(build: Path) -> tuple[str, list]:
    """Returns the cmake program and the command that configures `build`."""
    cmake, ninja = program("cmake", "CMAKE_BIN_DIR"), program("ninja", "BIN_DIR")
    torch = torch_root()
    if not cmake or not importlib.util.find_spec("pybind11"):
        missing = "pybind11" if cmake else "cmake"
        raise SystemExit(f"{missing} is not installed: run `pip install cmake ninja pybind11`")
    if not torch:
        raise SystemExit(f"{TORCH} is not installed: install it first, or run `pip install .`")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        name = f"python{sysconfig.get_python_version()}-dev"
        raise SystemExit(f"Python.h is missing: install Python's C headers (on Debian: `apt-get install {name}`)")
    import pybind11

    # Each path is passed every time: an isolated build leaves the paths of a vanished environment in the cache.
    configure = [
        *(cmake, "-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release"),
        f"-DCPR_FAST_CUDA={os.environ.get('CPR_FAST_CUDA', 'AUTO')}",
        f"-DCPR_FAST_EMULATE_AVX512={EMULATE_AVX512}",
        f"-DCPR_TORCH_ROOT={torch}",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DPYBIND11_FINDPYTHON=ON",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        # One layout below cpr_fast/ on every distribution: Fedora's default is lib64.
        *("-DCMAKE_INSTALL_LIBDIR=lib", "-DCMAKE_INSTALL_INCLUDEDIR=include"),
    ]
    return cmake, [*configure, *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else [])]


def program(name: str, folder: str) -> str | None:
    """Returns the program of the Python package `name`, which need not be on the PATH, or else the system's."""
    try:
        path = getattr(importlib.import_module(name), folder)
    except (ImportError, AttributeError):
        path = ""
    return shutil.which(name, path=path) or shutil.which(name)


def forget_stale_cache(build: Path, generator: str) -> None:
    """Deletes `build` if it belongs to another source directory or generator, which CMake refuses to change."""
    cache = build / "CMakeCache.txt"
    if not cache.exists():
        return
    values = dict(re.findall(r"^(CMAKE_HOME_DIRECTORY|CMAKE_GENERATOR):INTERNAL=(.*)$", cache.read_text(), re.M))
    if values != {"CMAKE_HOME_DIRECTORY": str(ROOT), "CMAKE_GENERATOR": generator}:
        shutil.rmtree(build)


setup(
    ext_modules=[Extension("cpr_fast._C", sources=[])],  # stands for both modules; CMake knows their sources
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
