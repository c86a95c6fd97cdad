"""Writes the operators as a kernel package for Hugging Face's kernel builder: `python hub/write.py FOLDER`.

The folder is what `kernel-builder` takes [Hugging Face, "Writing Hub kernels with kernel-builder"]: `build.toml`, the
C++ and CUDA sources that it names, and the Python modules in `torch-ext/cpr_fast/`. It is written from `csrc/`,
`cpr_fast/ops/` and the lists of CMakeLists.txt, and is not meant to be edited. The kernel builder adds `registration.h`
and `_ops.py` to it, which hold the namespace of one build; two builds can therefore be loaded in one process.

The kernel builder compiles each source once. The kernels of the CPU are compiled once for each CPU variant, so each
variant gets copies, which state the variant and its instructions in the lines above the source.
"""

import argparse
import ast
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HUB = ROOT / "hub"
NAME = "cpr-fast"  # lower-case letters, digits and dashes
TORCH = "2.10"  # the stable ABI of torch that the sources are written for
# The architectures of CMakeLists.txt; the kernel builder leaves out those that its nvcc does not know.
CAPABILITIES = ["8.0+PTX", "8.6", "8.9", "9.0a", "10.0", "12.0"]
NOT_COPIED = {"__init__.py", "__main__.py", "_ops.py"}  # `_init` and the kernel builder's `_ops.py` replace them

BUILD = """\
# Written by hub/write.py.
[general]
name = {name}
version = 0
edition = 5
license = "Apache-2.0"
backends = ["cpu", "cuda"]

[torch]
stable-abi = {torch}
include = ["csrc"]
# The kernels write every fused multiply-add explicitly, so the compiler must neither introduce nor split one.
cxx-flags = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-uninitialized", "-Wno-unused-function"]
src = {torch_src}

[kernel.{name_plain}]
backend = "cuda"
depends = ["torch"]
include = ["csrc"]
cuda-capabilities = {capabilities}
cuda-flags = ["-fmad=false"]
src = {cuda_src}
"""

VARIANT = """\
// Written by hub/write.py: csrc/{source} for the CPU variant {variant}.
{begin}#define CPR_VARIANT {variant}
#define CPR_VARIANT_{variant}
{text}{end}"""
INSTRUCTIONS = """\
#if defined(__x86_64__)
#if !defined(__GNUC__) || defined(__clang__)
#error "the CPU kernels of this package need GCC, which can set the instructions of a source file"
#endif
#pragma GCC target("{target}")
"""

INIT = '''\
"""The operators of cpr_fast for the CPU and CUDA: positive mining, its loss and optical flow; a module that holds a
queue; and BatchNorm modules.

Written by hub/write.py from cpr_fast/ops/__init__.py, whose functions these are.
"""

from . import dlpack
{imports}

__all__ = {names}
'''

# What CMakeLists.txt defines on the command line, and what the kernel builder defines in its place.
DISPATCH = """\
#if defined(CUDA_KERNEL)
#include <cuda_runtime_api.h>
#define CPR_CUDA_VERSION CUDART_VERSION
#define CPR_CUDA_ARCHITECTURES "{capabilities}"
#else
#define CPR_CUDA_VERSION 0
#define CPR_CUDA_ARCHITECTURES ""
#endif
"""


def main() -> None:
    """Writes the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Write the operators as a package for Hugging Face's kernel builder.")
    parser.add_argument("folder", type=Path, help="the folder to write; it must not exist, or be empty")
    folder = parser.parse_args().folder
    try:
        write(folder)
    except OSError as error:
        sys.exit(f"{folder}: the package could not be written: {error.strerror}")


def write(folder: Path) -> None:
    """Writes the kernel package. `folder` is complete or is not there.

    Exits with a message if `folder` exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        sys.exit(f"{folder}: expected a folder that does not exist or is empty, because an older package would mix in")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        written = Path(temporary) / "package"
        _write_sources(written)
        _write_python(written)
        for name in ("CARD.md", "flake.nix"):
            shutil.copyfile(HUB / name, written / name)
        shutil.copyfile(ROOT / "LICENSE", written / "LICENSE")
        written.replace(folder)


def _write_sources(out: Path) -> None:
    """Writes csrc/, torch-ext/torch_binding.cpp and build.toml, which names every file of them."""
    lists = _cmake_lists()
    compiled = []
    for variant, flags in lists["variants"].items():
        for source in lists["variant_sources"]:
            path = Path("csrc", "variants", variant, source.removeprefix("csrc/cpu/"))
            _put(out / path, _of_variant(source, variant, flags))
            compiled.append(path.as_posix())
    capabilities = ",".join(CAPABILITIES)
    for source in lists["sources"]:
        text = (ROOT / source).read_text(encoding="utf-8")
        if source == "csrc/ops/registration.cpp":
            source = "torch-ext/torch_binding.cpp"
            text = f'#include "registration.h"\n\n{text}\nREGISTER_EXTENSION(TORCH_EXTENSION_NAME)\n'
        elif source == "csrc/cpu/common/dispatch.cpp":
            text = DISPATCH.format(capabilities=capabilities) + text
        _put(out / source, text)
        compiled.append(source)
    headers = [path for folder in ("cpu", "cuda", "ops") for path in (ROOT / "csrc" / folder).rglob("*.*h")]
    named = {False: compiled, True: [*lists["cuda_sources"]]}
    for path in sorted([ROOT / "csrc" / "cpr_fast.h", *headers]):
        name = path.relative_to(ROOT).as_posix()
        named[name.startswith("csrc/cuda/")].append(name)
    for name in [*named[True], *(name for name in named[False] if name.endswith(".h"))]:
        _put(out / name, (ROOT / name).read_text(encoding="utf-8"))
    build = {
        "name": json.dumps(NAME),
        "name_plain": NAME,
        "torch": json.dumps(TORCH),
        "torch_src": json.dumps(named[False], indent=4),
        "capabilities": json.dumps(CAPABILITIES),
        "cuda_src": json.dumps(named[True], indent=4),
    }
    _put(out / "build.toml", BUILD.format(**build))


def _cmake_lists() -> dict:
    """Returns the sources of the library and the flags of the CPU variants, as CMakeLists.txt states them."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")

    def words(pattern: str) -> list[str]:
        return re.search(pattern, text).group(1).split()

    flags = {name: words(rf"set\(flags_{name} (-m[^)]*)\)") for name in ("avx2", "avx512")}
    return {
        "variants": {"portable": [], **flags},
        "variant_sources": words(r"set\(variant_sources ([^)]*)\)"),
        "sources": words(r"add_library\(cpr_fast STATIC ([^)]*)\)") + words(r"add_library\(_C MODULE ([^)]*)\)"),
        "cuda_sources": words(r"target_sources\(cpr_fast PRIVATE (csrc/cuda/[^)]*)\)"),
    }


def _of_variant(source: str, variant: str, flags: list[str]) -> str:
    """Returns the text of a source for one CPU variant. `flags`: the compiler's options that allow its instructions."""
    text = (ROOT / source).read_text(encoding="utf-8")
    target = ",".join(flag.removeprefix("-m") for flag in flags)
    begin, end = (INSTRUCTIONS.format(target=target), "#endif\n") if flags else ("", "")
    return VARIANT.format(source=source.removeprefix("csrc/"), variant=variant, begin=begin, text=text, end=end)


def _write_python(out: Path) -> None:
    """Writes torch-ext/cpr_fast/, the Python modules."""
    ops, package = ROOT / "cpr_fast" / "ops", out / "torch-ext" / NAME.replace("-", "_")
    for path in sorted(ops.rglob("*.py")):
        name = path.relative_to(ops).as_posix()
        if name not in NOT_COPIED:
            _put(package / name, path.read_text(encoding="utf-8"))
    _put(package / "__init__.py", _init((ops / "__init__.py").read_text(encoding="utf-8")))


def _init(text: str) -> str:
    """Returns the `__init__` of the package: what that of `cpr_fast.ops`, `text`, imports from its modules, and dlpack.
    The functions that it defines itself are about an installation of cpr_fast."""
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom) and node.level]
    names = sorted(["dlpack", *(alias.name for node in imports for alias in node.names)],
                   key=lambda name: (name.islower(), name))  # fmt: skip
    return INIT.format(imports="\n".join(map(ast.unparse, imports)), names=json.dumps(names, indent=4))


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
