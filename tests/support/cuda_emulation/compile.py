"""Compiles the sources of the CUDA kernels, unchanged, with the emulated device: fast, or with the sanitizer."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
FOLDER = Path(__file__).parent
CACHE = REPOSITORY / "build" / "cuda_emulation"
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
    "-fno-threadsafe-statics",  # the guard of a static variable is an atomic access, which the sanitizer does not have
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
    parts = [_kernels(operator, sanitize) for operator in OPERATORS]
    headers, flags = [*FOLDER.rglob("*.h")], ["-O2", *(["-DCPR_SANITIZE"] if sanitize else [])]
    parts += [_object(file, headers, flags) for file in FOLDER.glob("*.cpp")]
    if sanitize:
        parts += [_object(file, headers, flags) for file in FOLDER.glob("sanitizer/*.cpp")]
        parts.append(_instrumented(FOLDER / "sanitizer" / "faulty.cu", []))
    parts.sort()
    return compile_once([compiler(), *_FLAGS, "-shared", *map(str, parts), "-ldl"], CACHE / f"{digest(parts)}.so")


def compiler() -> str:
    """Returns the C++ compiler of the host."""
    return os.environ.get("CXX", "g++")


def digest(files: Iterable[Path], *texts: str) -> str:
    """Identifies the content of files, in any order, and texts, such as the flags that they are compiled with."""
    content = b"".join(path.read_bytes() for path in sorted(files))
    return hashlib.sha256(content + "\0".join(texts).encode()).hexdigest()[:16]


def compile_once(command: list[str], target: Path) -> Path:
    """Runs a command that writes to the path appended to it, unless the target exists. Returns the target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f"{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that share the tests compile once
        if not target.exists():
            partial = target.with_name(f"{target.stem}.{os.getpid()}{target.suffix}")
            subprocess.run([*command, "-o", str(partial)], check=True)
            os.replace(partial, target)
    return target


def _kernels(operator: str, sanitize: bool) -> Path:
    headers = [
        *SOURCES.glob("*.h"),
        *SOURCES.glob(f"cuda/{operator}/*.cuh"),
        *SOURCES.glob("cuda/common/*.cuh"),
        *SOURCES.glob(f"cpu/{operator}/*.h"),
    ]
    source = SOURCES / "cuda" / operator / f"{operator}.cu"
    if sanitize:
        return _instrumented(source, headers)
    return _object(source, [*headers, *FOLDER.glob("*.h")], ["-x", "c++", *_INCLUDES, "-O2"])


def _instrumented(source: Path, headers: list[Path]) -> Path:
    flags = ["-x", "c++", *_INCLUDES, "-O1", *_INSTRUMENTED]
    return _object(source, [*headers, *FOLDER.glob("*.h")], flags)


def _object(source: Path, headers: list[Path], flags: list[str]) -> Path:
    made = CACHE / f"{source.stem}-{digest([source, *headers], *_FLAGS, *flags)}.o"
    return compile_once([compiler(), *_FLAGS, *flags, "-c", str(source)], made)
