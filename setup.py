"""A thin driver of CMakeLists.txt, which holds the whole build description.

`python setup.py build_ext` (with or without --inplace) puts the modules into this checkout;
`pip install .` puts them into the wheel. Switches, all by environment variable:

CPR_FAST_CUDA=AUTO|ON|OFF   build the CUDA kernels where nvcc is | fail without nvcc | never
TORCH_CUDA_ARCH_LIST        e.g. "8.0;9.0a+PTX"; default: sm_80 and its PTX, and sm_90a
MAX_JOBS                    parallel compilations
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))
from build_backend import torch_root  # noqa: E402

# Older ones answer the license field of pyproject.toml with pages of JSON schema.
if int(re.match(r"\d+", setuptools.__version__)[0]) < 77:
    raise SystemExit(f"setuptools >= 77 is needed, this is {setuptools.__version__}: pip install 'setuptools>=77'")


class CMakeBuild(build_ext):
    def run(self) -> None:
        in_checkout = self.inplace or "build_ext" in self.distribution.commands
        build = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        prefix = ROOT if in_checkout else Path(self.build_lib).resolve()
        cmake = shutil.which("cmake")
        torch = torch_root()
        if cmake is None:
            raise SystemExit("cmake is missing: pip install cmake ninja pybind11")
        if not torch:
            raise SystemExit("torch is missing: install torch >= 2.10 first, or run `pip install .`")
        configure = [
            *(cmake, "-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release"),
            f"-DCPR_FAST_CUDA={os.environ.get('CPR_FAST_CUDA', 'AUTO')}",
            f"-DCPR_TORCH_ROOT={torch}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DPYBIND11_FINDPYTHON=ON",
        ]
        # Each path is passed every time: an isolated build leaves the paths of a vanished environment in the cache.
        import pybind11

        configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
        if ninja := shutil.which("ninja"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", build, "--parallel", jobs], check=True)
        subprocess.run([cmake, "--install", build, "--prefix", prefix, "--component", "python"], check=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib, "cpr_fast").glob("_*.so")]


# One extension stands for both modules: CMake knows their sources.
setup(ext_modules=[Extension("cpr_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
