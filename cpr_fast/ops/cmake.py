"""Where C++ programs find the kernels: the C header, the static library and the CMake config files."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def cmake_dir() -> str:
    """Returns the directory of cpr_fast-config.cmake, which `find_package(cpr_fast)` takes as -Dcpr_fast_DIR."""
    return _existing(_PACKAGE / "lib" / "cmake" / "cpr_fast")


def include_dir() -> str:
    """Returns the directory of the C header cpr_fast.h."""
    return _existing(_PACKAGE / "include")


def _existing(folder: Path) -> str:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: run `pip install .` or `python setup.py build_ext`")
    return str(folder)
