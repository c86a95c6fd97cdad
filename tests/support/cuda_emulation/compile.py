"""Compiles the sources of the CUDA kernels, unchanged, with the emulated device: fast, or with the sanitizer."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
FOLDER = Path(__file__).parent
# Where the kernels are; bench/kernels/mutations.py sets it to changed copies.
SOURCES = Path(os.environ.get("CPR_FAST_CUDA_SOURCES", REPOSITORY / "csrc"))
# The operators to compile: all, unless a test of one is to be quick.
OPERATORS = os.environ.get("CPR_FAST_CUDA_OPERATORS", "cascade_select,mil_nce,tvl1_flow").split(",")

_FLAGS = [
    "-std=c++17",
    os.environ.get("CPR_FAST_CUDA_DEBUG", "-g"),  # "-g0" compiles faster, but then reports name no lines
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-tree-slp-vectorize",  # with it GCC 12 omits the rounding of a pair of doubles to float
    "-U_FORTIFY_SOURCE",  # longjmp between stacks
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"),
]
# GCC calls a function for every access of the kernels. The accesses of the emulated device are not instrumented.
_INSTRUMENTED = [
    "-fsanitize=thread,alignment,bounds,shift,signed-integer-overflow",
    *("--param", "tsan-distinguish-volatile=1", "--param", "tsan-instrument-func-entry-exit=0"),
    "-Wno-maybe-uninitialized",  # the fast build has the warnings; instrumentation adds wrong ones
]
_INCLUDES = [f"-I{FOLDER}", f"-I{SOURCES}"]


def build(sanitize: bool = False) -> Path:
    """Returns the path of the library, after compiling what has changed."""
    folder = REPOSITORY / "build" / "cuda_emulation"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that share the tests compile once
        parts = [_kernels(folder, operator, sanitize) for operator in OPERATORS]
        files = sorted(FOLDER.glob("sanitizer/*.cpp" if sanitize else "*.cpp"))
        for file in {*files, *FOLDER.glob("*.cpp")}:
            headers = [*FOLDER.rglob("*.h")]
            parts.append(_object(folder, file, headers, ["-O2", *(["-DCPR_SANITIZE"] if sanitize else [])]))
        if sanitize:
            parts.append(_instrumented(folder, FOLDER / "sanitizer" / "faulty.cu", []))
        parts.sort()
        library = folder / f"{_digest(parts, '')}.so"
        if not library.exists():
            _compile([*_FLAGS, "-shared", *map(str, parts), "-ldl"], library)
    return library


def _kernels(folder: Path, operator: str, sanitize: bool) -> Path:
    headers = [
        *SOURCES.glob("*.h"),
        *SOURCES.glob(f"cuda/{operator}/*.cuh"),
        *SOURCES.glob("cuda/common/*.cuh"),
        *SOURCES.glob(f"cpu/{operator}/*.h"),
    ]
    source = SOURCES / "cuda" / operator / f"{operator}.cu"
    if sanitize:
        return _instrumented(folder, source, headers)
    return _object(folder, source, [*headers, *FOLDER.glob("*.h")], ["-x", "c++", *_INCLUDES, "-O2"])


def _instrumented(folder: Path, source: Path, headers: list[Path]) -> Path:
    flags = ["-x", "c++", *_INCLUDES, "-O1", *_INSTRUMENTED]
    return _object(folder, source, [*headers, *FOLDER.glob("*.h")], flags)


def _object(folder: Path, source: Path, headers: list[Path], flags: list[str]) -> Path:
    made = folder / f"{source.stem}-{_digest([source, *sorted(headers)], ' '.join([*_FLAGS, *flags]))}.o"
    if not made.exists():
        _compile([*_FLAGS, *flags, "-c", str(source)], made)
    return made


def _digest(files: list[Path], flags: str) -> str:
    digest = hashlib.sha256(flags.encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(arguments: list[str], made: Path) -> None:
    partial = made.with_suffix(f".{os.getpid()}")
    subprocess.run([os.environ.get("CXX", "g++"), *arguments, "-o", str(partial)], check=True)
    os.replace(partial, made)
