"""The structure of the repository: which folders may import each other, and how long files and functions may be."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "cpr_fast"
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_FILES = 400, 60, 9

# The layers, which are packages and single modules, from the bottom up: a layer may import itself and layers earlier in
# this list, except for those in FORBIDDEN.
ORDER = (
    "wording",
    "errors",
    "config",
    "runtime",
    "ops",
    "models",
    "mining",
    "integrations",
    "weights",
    "data.files",
    "data.video",
    "data.storage",
    "data.index",
    "data.flow",
    "data.clips",
    "data.features",
    "data.synthetic",
    "evaluate.features",
    "evaluate.retrieval",
    "evaluate.duplicates",
    "evaluate.classify",
    "pretrain.state",
    "pretrain.step",
    "pretrain.ledger",
    "pretrain.run",
    "report.figures",
    "report.run_folder",
    "report.sections",
    "report",
    "experiments",
    "doctor",
    "commands",
    "cli",
)
# Layers that must not be imported although they come earlier in the list: operators need only torch, networks and data
# do not depend on each other, and evaluation and reports do not depend on training.
FORBIDDEN = {
    "ops": {"config", "runtime"},
    "models": {"runtime"},
    "weights": {"ops", "mining"},
    "data": {"models", "mining", "weights"},
    "report": {"models", "ops", "pretrain"},
    "evaluate": {"mining"},
}


def python_files(*folders: str) -> list[Path]:
    """Returns the Python files below the folders that git tracks or does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [ROOT / name for name in listed if name.endswith(".py") and (ROOT / name).is_file()]


def layer_of(module: str) -> str:
    """Returns the layer of a module: the longest entry of ORDER that its name starts with, or "" if there is none."""
    name = module.removeprefix("cpr_fast").removeprefix(".")
    layers = [layer for layer in ORDER if name == layer or name.startswith(layer + ".")]
    return max(layers, key=len, default="")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> Iterator[str]:
    """Returns every module of cpr_fast that a file imports, including imports inside functions."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("cpr_fast"))
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            if module.startswith("cpr_fast"):
                yield from (f"{module}.{alias.name}" for alias in node.names)


PACKAGE_FILES = python_files("cpr_fast")


def test_imports_run_downwards():
    wrong = []
    for path in PACKAGE_FILES:
        own = layer_of(module_name(path))
        for module in imported_modules(path):
            other = layer_of(module)
            if not own or not other or other == own:
                continue
            forbidden = {layer for key, layers in FORBIDDEN.items() if own.split(".")[0] == key for layer in layers}
            if ORDER.index(other) > ORDER.index(own) or other.split(".")[0] in forbidden:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_modules_have_no_circles():
    names = {module_name(path): path for path in PACKAGE_FILES}
    imports = {
        name: {
            next((m for m in (target, target.rsplit(".", 1)[0]) if m in names), None)
            for target in imported_modules(path)
        }
        - {None, name}
        for name, path in names.items()
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " imports ".join([*above[above.index(name) :], name])
        if name not in done:
            for target in imports.get(name, ()):
                visit(target, (*above, name))
            done.add(name)

    for name in imports:
        visit(name, ())


@pytest.mark.parametrize("folder", ["cpr_fast", "tests", "bench", "examples", "hub"])
def test_python_files_and_functions_are_short(folder):
    long = []
    for path in python_files(folder):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert not long


def test_cpp_files_and_functions_are_short():
    long = []
    sources = [path for pattern in ("*.cpp", "*.h", "*.cu", "*.cuh") for path in sorted((ROOT / "csrc").rglob(pattern))]
    assert len(sources) > 20
    for path in sources:
        lines = path.read_text(encoding="utf-8").split("\n")
        if len(lines) - 1 > MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {len(lines) - 1} lines")
        begin = None
        for number, line in enumerate(lines):  # clang-format puts the braces of a function into the first column
            if begin is None and re.match(r"[\w\[~].*\)[^;]*\{$", line):
                begin = number
            elif begin is not None and line.startswith("}"):
                if number - begin + 1 > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{begin + 1}: {number - begin + 1} lines")
                begin = None
    assert not long


def test_every_folder_is_small_and_says_what_lives_there():
    folders = sorted({path.parent for path in PACKAGE_FILES})
    for folder in folders:
        files = [path for path in PACKAGE_FILES if path.parent == folder and path.name != "__init__.py"]
        assert len(files) <= MAX_FILES, f"{folder.relative_to(ROOT)} holds {len(files)} modules"
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert text and len(text.split("\n\n")) >= 2 or folder == PACKAGE, f"{folder.relative_to(ROOT)}/__init__.py"
    for folder in sorted({path.parent for path in python_files("tests", "bench")}):
        assert len(list(folder.glob("*.py"))) <= MAX_FILES, folder.relative_to(ROOT)


def test_packages_state_truly_what_they_import_and_which_packages_may_import_them():
    """The last paragraph of `__init__`: "Imports `a` and `b`; `c` and `d` may import it", where `a` stands for all of
    `a.*`. `errors` and `wording` may be imported by any package, and `cli` imports commands only."""
    packages = {module_name(path).partition(".")[2] for path in PACKAGE_FILES if path.name == "__init__.py"} - {""}
    stated = {}
    for package in packages:
        init = PACKAGE / package.replace(".", "/") / "__init__.py"
        paragraph = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))).split("\n\n")[-1]
        if paragraph.startswith("Imports `"):
            imports, _, importers = paragraph.partition(";")
            everything = "all packages above it" in importers
            names = [re.findall(r"`([\w.]+)`", part) for part in (imports, importers)]
            stated[package] = names[0], [*ORDER] if everything else names[1]
    assert len(stated) > 15

    def package_of(module: str) -> str:
        name = module.partition(".")[2]
        return max((p for p in packages if name == p or name.startswith(p + ".")), key=len, default="")

    def covers(names: list[str], package: str) -> bool:
        return any(package == name or package.startswith(name + ".") for name in names)

    wrong = set()
    for path in PACKAGE_FILES:
        own = package_of(module_name(path))
        for other in {package_of(module) for module in imported_modules(path)} - {own, ""}:
            if own in stated and not covers(stated[own][0], other) and not other.startswith(own + "."):
                wrong.add(f"{own} does not state that it imports {other}")
            if own and other in stated and not covers(stated[other][1], own) and not other.startswith(own + "."):
                wrong.add(f"{other} does not state that {own} may import it")
    known = {*ORDER, *packages, "bench"}
    assert not wrong and {name for pair in stated.values() for names in pair for name in names} <= known


def test_tests_are_divided_like_the_code():
    layers = {layer.replace(".", "/") for layer in ORDER}
    others = {"bench", "docs", "packaging", "support"}
    for path in python_files("tests"):
        layer = str(path.parent.relative_to(ROOT / "tests"))
        if path.name.startswith("test_") and layer.split("/")[0] not in others:
            assert any(layer == known or layer.startswith(known + "/") for known in layers), path.relative_to(ROOT)


def test_the_readmes_plain_torch_is_equivalent():
    fused, plain = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    generator = torch.Generator().manual_seed(0)
    names = {"queries": (2, 3, 16), "memory": (2, 1500, 16), "query": (3, 16), "own_key": (3, 16)}
    given = {name: F.normalize(torch.randn(shape, generator=generator), dim=-1) for name, shape in names.items()}
    given |= {"torch": torch, "B": 3, "K": 1500}
    ours, theirs = dict(given), dict(given)
    exec(fused, ours)
    exec(plain, theirs)
    for name in ("indices", "scores", "loss"):
        torch.testing.assert_close(ours[name], theirs[name])


# A number directly before a plural noun; what stands between braces is an expression.
NOUNS = "videos|windows|clips|sources|rows|epochs|steps|seeds|pairs"
PLURAL = re.compile(rf"\{{([^{{}}]+)\}} (?:(?:training|test|sampled) )?(?:{NOUNS})\b(?!/)")
NO_NUMBER = re.compile(r"^[A-Z_]+$|listed|numbers\[|_span|VIEW|verb$")  # constants, lists of numbers, other words


def test_messages_count_with_the_helper_that_knows_the_singular():
    """`counted(1, "video")` is "1 video"; a number in front of a written plural would be "1 videos"."""
    wrong = []
    for path in sorted((ROOT / "cpr_fast").rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for found in PLURAL.finditer(line) if 'f"' in line or "f'" in line else ():
                if not NO_NUMBER.search(found[1].partition(":")[0]) and line[: found.start()].rstrip()[-1:] != "=":
                    wrong.append(f"{path.relative_to(ROOT)}:{number}: {found[0]}")
    assert not wrong
