"""The kernel package of `hub/write.py`: the rules of Hugging Face's kernel builder, and two builds in one process.

The rules are those of its page "Kernel requirements".
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.packaging.distribution import ROOT, attempt, run
from support.packaging.kernel_builder import build

from cpr_fast import _host, ops
from cpr_fast.ops.binding import library

WRITE = ROOT / "hub" / "write.py"
# The modules of Python 3.9 that the package may import.
STANDARD = {
    "__future__",
    "collections",
    "ctypes",
    "dataclasses",
    "math",
    "numbers",
    "operator",
    "pathlib",
    "sys",
    "typing",
    "warnings",
}
# The keys of build.toml, edition 5, that the package uses [kernels-data/src/config/v5.rs].
KEYS = {
    "general": {"name", "version", "edition", "license", "backends"},
    "torch": {"stable-abi", "include", "cxx-flags", "src"},
    "kernel": {"backend", "depends", "include", "cuda-capabilities", "cuda-flags", "src"},
}


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "cpr fast"
    runpy.run_path(str(WRITE))["write"](folder)
    return folder


def violations(text: str) -> Iterator[str]:
    """Yields what a module contains that the kernel builder or Python 3.9 refuses."""
    try:
        tree = ast.parse(text, feature_version=(3, 9))
    except SyntaxError as error:
        yield f"syntax: {error.msg}"
        return
    deferred = "from __future__ import annotations" in text
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"import {name}" for name in names if name.partition(".")[0] not in {"torch", *STANDARD})
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "zip" and node.keywords:
                yield "zip(strict=...)"
            if node.func.id in ("isinstance", "issubclass") and isinstance(node.args[1], ast.BinOp):
                yield f"{node.func.id} of a union"
        elif isinstance(node, ast.arg | ast.AnnAssign | ast.FunctionDef) and not deferred:
            annotation = node.returns if isinstance(node, ast.FunctionDef) else node.annotation
            if any(isinstance(part, ast.BitOr) for part in ast.walk(annotation or ast.Pass())):
                yield "a union that Python evaluates"
        elif isinstance(node, ast.Attribute | ast.Constant):
            text_of = ast.unparse(node) if isinstance(node, ast.Attribute) else str(node.value)
            if re.fullmatch(r"(torch\.ops\.)?cpr_fast(::\w*)?", text_of):
                yield "the namespace of another build"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("match x:\n    case 1: pass", "syntax: Pattern matching is only supported in Python 3.10 and greater"),
        ("def f(x: int | None): pass", "a union that Python evaluates"),
        ("def f() -> int | None: pass", "a union that Python evaluates"),
        ("from __future__ import annotations\ndef f(x: int | None): pass", None),
        ("isinstance(x, int | str)", "isinstance of a union"),
        ("zip(a, b, strict=True)", "zip(strict=...)"),
        ("import tomllib", "import tomllib"),
        ("def f():\n    import numpy.linalg", "import numpy.linalg"),
        ("from cpr_fast.errors import InputError", "import cpr_fast.errors"),
        ("from ..binding import checks", None),
        ("torch.ops.cpr_fast.mil_nce(x)", "the namespace of another build"),
        ("register_fake('cpr_fast::mil_nce')", "the namespace of another build"),
    ],
)
def test_the_rules_find_what_they_forbid(text, expected):
    assert list(violations(text)) == ([] if expected is None else [expected])


def test_the_python_modules_keep_the_rules(package):
    modules = sorted((package / "torch-ext" / "cpr_fast").rglob("*.py"))
    assert len(modules) > 8
    assert {path.name: found for path in modules if (found := list(violations(path.read_text())))} == {}


def test_the_package_exports_the_operators(package):
    tree = ast.parse((package / "torch-ext" / "cpr_fast" / "__init__.py").read_text())
    (exported,) = (ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    assert exported == sorted(
        {*ops.__all__, "dlpack"} - {"cmake_dir", "include_dir"}, key=lambda name: (name.islower(), name)
    )


def test_the_command_names_a_folder_that_it_cannot_write(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for folder, message in ((".", "Device or resource busy"), (tmp_path / "file" / "x", "File exists"),
                            (tmp_path / "full", "expected a folder that does not exist or is empty")):  # fmt: skip
        place = tmp_path / "empty"
        place.mkdir(exist_ok=True)
        done = subprocess.run([sys.executable, WRITE, folder], cwd=place, capture_output=True, text=True)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
        assert done.stderr.startswith(f"{folder}: ") and not any(place.iterdir())


def test_build_toml_names_every_source(package):
    settings = tomllib.loads((package / "build.toml").read_text())
    (kernel,) = settings["kernel"].values()
    assert {"general": {*settings["general"]}, "torch": {*settings["torch"]}, "kernel": {*kernel}} == KEYS
    assert re.fullmatch("[a-z][-a-z0-9]*[a-z0-9]", settings["general"]["name"])
    named = [*settings["torch"]["src"], *kernel["src"]]
    assert "torch-ext/torch_binding.cpp" in named and "csrc/ops/registration.cpp" not in named
    written = [path for path in package.rglob("*") if path.suffix in (".cpp", ".cu", ".h", ".cuh")]
    assert sorted(named) == sorted(str(path.relative_to(package)) for path in written)
    # Everything but the NumPy helpers travels, and each kernel of the CPU once for each variant.
    of_one_variant = [name for name in named if name.startswith("csrc/variants/avx512/")]
    compiled = [path for path in (ROOT / "csrc").rglob("*.c*") if path.suffix == ".cpp" and path.parent.name != "host"]
    assert len(of_one_variant) == 12
    assert len([name for name in named if name.endswith(".cpp")]) == len(compiled) + 2 * len(of_one_variant)
    assert {name for name in named if name.endswith(".cu")} == {
        str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cu")
    }


def test_the_released_kernels_library_reads_build_toml(package):
    rust = pytest.importorskip("kernels._rust", reason="needs Hugging Face's package kernels")
    assert [str(backend) for backend in rust.Build.open(package).general.backends] == ["cpu", "cuda"]


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    (tmp_path / "a file").touch()
    for name in ("old", "a file"):
        done = attempt(sys.executable, WRITE, name, folder=tmp_path)
        assert done.returncode == 1 and done.stderr.startswith(f"{name}: expected a folder that does not exist")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a file", "file", "old"]
    assert attempt(sys.executable, WRITE, folder=tmp_path).returncode == 2


def undefined_symbols(path: Path) -> set[str]:
    listed = run("nm", "-D", "--undefined-only", "--format=posix", path, folder=path.parent)
    return {line.split()[0] for line in listed.splitlines()}


def needs_stable_interfaces_only(path: Path, of_python: set[str]) -> None:
    """Asserts that a library needs no symbol of CPython but `of_python`, and of torch only functions of its C
    interface."""
    symbols = undefined_symbols(path)
    assert {name for name in symbols if name.startswith(("Py", "_Py"))} == of_python
    assert {name for name in symbols if re.search(r"_ZNK?\d*(2at|3c10|5torch|8pybind11)", name)} == set()
    assert any(name.startswith("aoti_torch_") for name in symbols)


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm (binutils)")
def test_the_operator_library_needs_stable_interfaces_only():
    needs_stable_interfaces_only(library.PATH, set())


# What a user of two builds runs; `cpr_fast` cannot be imported.
USE = """
import importlib.util, sys, warnings
from pathlib import Path
import torch
sys.modules["cpr_fast"] = None
results = {}
for folder in map(Path, sys.argv[2:]):
    spec = importlib.util.spec_from_file_location(folder.name, folder / "__init__.py")
    module = sys.modules[folder.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results[folder.name] = compute(module, compiles=len(sys.argv) > 3)
assert not hasattr(torch.ops.cpr_fast, "mil_nce"), "the operators of cpr_fast are registered"
torch.save(results, sys.argv[1])
"""
COMPUTE = """
import torch

def compute(ops, compiles):
    torch.manual_seed(5)
    features = torch.nn.functional.normalize(torch.randn(2, 90, 33), dim=2)
    memory, queries = features[:, :83], features[:, 83:]
    ids = {"query_ids": torch.arange(7), "memory_ids": torch.arange(83) % 11 - 1}
    slots, scores = ops.cascade_select(queries, memory, [1, 0, 1], [60, 20, 5], **ids)
    query = queries[0].clone().requires_grad_()
    loss = ops.mil_nce(query, queries[1], memory[0], slots, **ids)
    loss.backward()
    flow = ops.tvl1_flow(torch.randint(0, 256, (3, 37, 41), dtype=torch.uint8))
    both, _ = ops.cascade_mil_nce(queries, queries[1], memory, [1, 0, 1], [60, 20, 5], **ids)
    mapped = torch.vmap(lambda q: ops.mil_nce(q, q, memory[0], reduction="none"))(queries)
    compiled = torch.compile(ops.mil_nce, fullgraph=True, backend="aot_eager") if compiles else ops.mil_nce
    compiled = compiled(query.detach(), queries[1], memory[0])
    normalised = ops.BatchNorm1d(33)(queries[0].contiguous())
    return [x.detach() for x in (slots, scores, loss, query.grad, flow, both, mapped, compiled, normalised)]
"""


@pytest.fixture(scope="module")
def builds(package, tmp_path_factory) -> list[Path]:
    if folder := os.environ.get("CPR_FAST_KERNEL_BUILDS"):  # builds of an earlier run, to work on this file
        return sorted(Path(folder).glob("_cpr_fast_cpu_*"))
    return build(package, tmp_path_factory.mktemp("built"), ["0a1b2c3", "d4e5f60"])


@pytest.mark.packaging
def test_two_builds_in_one_process_have_the_bits_of_the_library(builds, tmp_path):
    run(sys.executable, "-W", "ignore", "-c", COMPUTE + USE, "results.pt", *builds, folder=tmp_path)
    results = torch.load(tmp_path / "results.pt")
    namespace: dict = {}
    exec(COMPUTE, namespace)
    expected = namespace["compute"](ops, compiles=False)
    assert [*results] == [folder.name for folder in builds] and len(results) == 2
    for found in results.values():
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.packaging
def test_a_build_loads_by_the_kernels_library(builds, tmp_path):
    pytest.importorskip("kernels", reason="needs Hugging Face's package kernels")
    program = (
        "import sys; sys.modules['cpr_fast'] = None; from pathlib import Path; from kernels import get_local_kernel\n"
        "kernels = [get_local_kernel(Path(folder)) for folder in sys.argv[1:]]\n"
        "import torch; x = torch.eye(4)[None]\n"
        "print(*[kernel.cascade_select(x, x, [0], [1])[0].flatten().tolist() for kernel in kernels])"
    )
    printed = run(sys.executable, "-W", "ignore", "-c", program, *builds, folder=tmp_path,
                  PYTHONPATH=os.environ.get("PYTHONPATH", ""))  # fmt: skip
    assert printed.strip() == "[0, 1, 2, 3] [0, 1, 2, 3]"


@pytest.mark.packaging
def test_a_build_needs_stable_interfaces_only(builds):
    for folder in builds:
        (path,) = folder.glob("*.abi3.so")
        needs_stable_interfaces_only(path, {"PyModule_Create2"})
        if importlib.util.find_spec("kernel_abi_check"):
            import kernel_abi_check

            assert kernel_abi_check.ObjectFile(path).check_python_abi("3.9") == []


@pytest.mark.packaging
def test_a_build_uses_the_instructions_of_each_variant(builds, tmp_path):
    """The variants are compiled through pragmas; each has the bits of the others, and an unknown one is an error."""
    program = COMPUTE + USE
    results = []
    for variant in _host.build_info()["cpu_variants"].split(","):
        run(sys.executable, "-W", "ignore", "-c", program, f"{variant}.pt", builds[0], folder=tmp_path,
            CPR_FAST_CPU_VARIANT=variant)  # fmt: skip
        results += torch.load(tmp_path / f"{variant}.pt").values()
    for found in results:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))
    disassembled = subprocess.run(["objdump", "-d", *builds[0].glob("*.so")], capture_output=True, text=True).stdout
    assert "%zmm" in disassembled and "%ymm" in disassembled
    done = attempt(sys.executable, "-c", program, "x.pt", builds[0], folder=tmp_path, CPR_FAST_CPU_VARIANT="sse")
    assert done.returncode == 1 and "CPR_FAST_CPU_VARIANT: expected a variant" in done.stderr
