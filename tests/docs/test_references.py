"""Files and modules that pages, comments and docstrings name exist."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
FOLDERS = "cpr_fast|csrc|bench|tests|docs|configs|examples|cmake"
# What a build installs, and what only exists in a test.
ELSEWHERE = re.compile(r"cpr_fast/(lib|include)\b|cmake/cpr_fast|cpr_fast/moved\.py|csrc/api/|tableN_ID")


@cache
def prose_of(path: Path) -> str:
    """Returns the docstrings and comments of a Python file, or the whole text of any other file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    comments = re.findall(r"(?:^|  )# .*", text, re.MULTILINE)
    return "\n".join([*filter(None, map(ast.get_docstring, nodes)), *comments])


def files() -> Iterator[Path]:
    suffixes = {".py", ".md", ".cpp", ".h", ".cu", ".cuh", ".toml", ".sh", ".sbatch", ".j2"}
    paths = [ROOT / name for name in TRACKED if not name.startswith("bench/results/")]
    yield from (path for path in paths if path.suffix in suffixes and path.is_file())


def test_paths_exist():
    wrong = []
    for path in files():
        for name in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./*<>{{}}$-]+", prose_of(path)):
            name = name.rstrip(".,-")
            exists = (ROOT / name).exists() or (ROOT / f"{name}.py").exists()
            if not exists and not re.search(r"[*<>{}$]", name) and not ELSEWHERE.search(name):
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert not wrong


@cache
def names_of(module: str) -> frozenset[str] | None:
    """Returns the names that a module of cpr_fast defines or imports, or None if there is no such module."""
    base = ROOT / module.replace(".", "/")
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if not path.is_file():
        return None
    names = re.findall(
        r"^ *(?:def|class) (\w+)|^(\w+)(?:, \w+)* *[:=]|^    (\w+),?$|\bimport (\w+)$", path.read_text(), re.M
    )
    return frozenset(name for group in names for name in group if name)


def test_modules_and_their_names_exist():
    wrong = []
    for path in files():
        for name in re.findall(r"(?<![\w.])cpr_fast(?:\.\w+)+", prose_of(path)):
            parts = name.split(".")
            end = next((i for i in range(2, len(parts) + 1) if names_of(".".join(parts[:i])) is None), len(parts) + 1)
            rest = parts[end - 1 :]
            known = names_of(".".join(parts[: end - 1])) or frozenset()
            if rest and rest[0] not in known and rest[0] not in {"_host", "_C", "h"}:
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert not wrong
