"""Builds a kernel package for the CPU as Hugging Face's kernel builder does, which itself needs Nix.

The definitions, flags and files are those of its templates [github.com/huggingface/kernels,
kernel-builder/src/pyproject/templates: utils.cmake, torch/preamble.cmake, torch/torch-extension.cmake].
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

# What the kernel builder generates beside the sources.
REGISTRATION = """\
#pragma once
#include <Python.h>
#define JOINED_(a, b) a##b
#define JOINED(a, b) JOINED_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)
#define REGISTER_EXTENSION(NAME)                                                                           \\
  PyMODINIT_FUNC JOINED(PyInit_, NAME)() {                                                                 \\
    static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, TEXT(NAME), nullptr, 0, nullptr};           \\
    return PyModule_Create(&module);                                                                       \\
  }
"""
OPS = """\
import torch
from . import {name}

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str):
    return f"{name}::{{op_name}}"
"""


def build(package: Path, out: Path, builds: list[str]) -> list[Path]:
    """Builds `package` for the CPU once for each name in `builds`; returns the folders that a user can load.

    Files that do not contain the namespace of the operators are compiled once.
    """
    settings = tomllib.loads((package / "build.toml").read_text(encoding="utf-8"))
    name, torch = settings["general"]["name"], settings["torch"]
    (package / "torch-ext" / "registration.h").write_text(REGISTRATION)
    sources = [source for source in torch["src"] if source.endswith(".cpp")]
    major, minor = map(int, torch["stable-abi"].split("."))
    includes = [*(str(package / folder) for folder in torch["include"]), *include_paths()]
    command = [
        *("c++", "-c", "-std=gnu++20", "-O3", "-DNDEBUG", "-fPIC", "-fno-gnu-unique", "-DCPU_KERNEL"),
        *("-DPy_LIMITED_API=0x03000000", f"-DTORCH_TARGET_VERSION={major << 56 | minor << 48}ULL"),
        *torch["cxx-flags"],
        *(f"-I{folder}" for folder in [*includes, sysconfig.get_path("include")]),
    ]

    def compiled(source: str, namespace: str) -> Path:
        target = out / "objects" / namespace / f"{source}.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        defined = [f"-DTORCH_EXTENSION_NAME={namespace}"] if namespace else []
        subprocess.run([*command, *defined, str(package / source), "-o", str(target)], check=True)
        return target

    binding = "torch-ext/torch_binding.cpp"
    namespaces = [f"_{name.replace('-', '_')}_cpu_{unique}" for unique in builds]
    jobs = [(source, "") for source in sources if source != binding] + [(binding, name) for name in namespaces]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compiled(*job), jobs))
    shared = objects[: len(sources) - 1]
    return [_installed(package, out / namespace, settings, [*shared, own])
            for namespace, own in zip(namespaces, objects[len(shared) :], strict=True)]  # fmt: skip


def _installed(package: Path, folder: Path, settings: dict, objects: list[Path]) -> Path:
    """Links a library and lays out a build of the package, as it lies on the Hub."""
    general, namespace = settings["general"], folder.name
    shutil.copytree(package / "torch-ext" / general["name"].replace("-", "_"), folder)
    libraries = [f"-L{TORCH_LIB_PATH}", "-ltorch", "-ltorch_cpu", "-lc10"]
    library = folder / f"{namespace}.abi3.so"
    subprocess.run(["c++", "-shared", *map(str, objects), "-o", str(library), *libraries], check=True)
    (folder / "_ops.py").write_text(OPS.format(name=namespace))
    metadata = {"id": namespace, "backend": {"type": "cpu"}, "python-depends": []} | {
        key: general[key] for key in ("name", "version", "license")
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder
