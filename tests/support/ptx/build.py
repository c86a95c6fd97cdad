"""Compiles what the PTX interpreter needs: the PTX of the kernels, the interpreter, and the host code of the operators.

Everything is kept in build/ptx under a digest of what it was made of.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from support.cuda_emulation.compile import FOLDER as EMULATION
from support.cuda_emulation.compile import REPOSITORY, SOURCES, compile_once, compiler, digest

FOLDER = Path(__file__).parent
CACHE = REPOSITORY / "build" / "ptx"


def find_nvcc() -> str | None:
    """Returns the path of nvcc, or None; the toolkit's own nvcc is preferred, as in CMakeLists.txt."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def compile_ptx(operator: str, architecture: str) -> Path:
    """Returns the PTX of an operator, made with the flags of CMakeLists.txt and line numbers."""
    nvcc = find_nvcc()
    assert nvcc is not None
    version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    flags = ["-std=c++17", "-O3", "-fmad=false", "-lineinfo", f"-I{SOURCES}", f"-arch=compute_{architecture}", "-ptx"]
    source = SOURCES / "cuda" / operator / f"{operator}.cu"
    headers = [path for folder in (operator, "common") for path in SOURCES.glob(f"cuda/{folder}/*.cuh")]
    headers += [*SOURCES.glob("*.h"), *SOURCES.glob(f"cpu/{operator}/*.h")]
    made = CACHE / f"{operator}-{architecture}-{digest([source, *headers], version, *flags)}.ptx"
    return compile_once([nvcc, *flags, str(source)], made)


def build_interpreter() -> Path:
    sources = [*FOLDER.glob("parse/*.cpp"), *FOLDER.glob("run/*.cpp")]
    headers = [*FOLDER.glob("parse/*.h"), *FOLDER.glob("run/*.h"), EMULATION / "matrix_descriptor.h"]
    flags = ["-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC"]
    flags += ["-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
    parts = []
    for source in sorted(sources):
        made = CACHE / f"{source.stem}-{digest([source, *headers], _processor(), *flags)}.o"
        parts.append(compile_once([compiler(), *flags, "-c", str(source)], made))
    library = CACHE / f"libptx-{digest([], *map(str, parts))}.so"
    return compile_once([compiler(), "-shared", *map(str, parts)], library)


def build_host(interpreter: Path) -> Path:
    """Returns the host code of the operators, whose launches go to the interpreter."""
    kernels = [*SOURCES.glob("cuda/*/*.cu")]
    emulation = [*EMULATION.glob("*.cpp"), FOLDER / "host" / "launch.cpp"]
    headers = [path for pattern in ("*.cuh", "*.h") for path in SOURCES.rglob(pattern)]
    headers += [*FOLDER.glob("host/*.h"), *EMULATION.glob("*.h")]
    flags = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-w", "-U_FORTIFY_SOURCE"]
    flags += [f"-I{EMULATION}", f"-I{SOURCES}", "-include", str(FOLDER / "host" / "launch.h"), "-x", "c++"]
    parts = []
    for source in sorted(kernels + emulation):
        made = CACHE / f"{source.stem}-host-{digest([source, *headers], *flags)}.o"
        parts.append(compile_once([compiler(), *flags, "-c", str(source)], made))
    library = CACHE / f"host-{digest([], interpreter.name, *map(str, parts))}.so"
    return compile_once([compiler(), "-shared", *map(str, parts), str(interpreter)], library)


def _processor() -> str:
    """Returns the features of the processor that -march=native stands for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
