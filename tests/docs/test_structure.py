"""The README's plain PyTorch is equivalent to the operators, and no part of the package imports what it may not."""

import ast
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"ops", "data", "models", "pretrain", "evaluate", "report", "cli"}
FORBIDDEN = {
    "ops": PARTS - {"ops"},
    "data": PARTS - {"data", "ops"},  # flow is an operator
    "models": PARTS - {"models"},
    "pretrain": {"report", "cli"},
    "evaluate": {"pretrain", "report", "cli"},
    "report": {"pretrain", "cli"},
}


def imported_parts(path: Path) -> set[str]:
    """The parts of cpr_fast that a module imports, inside functions too."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("cpr_fast.")} & PARTS


@pytest.mark.parametrize("part", FORBIDDEN)
def test_parts_know_only_what_they_may(part):
    modules = sorted((ROOT / "cpr_fast" / part).glob("*.py"))
    assert modules
    found = {path.name: imported_parts(path) & FORBIDDEN[part] for path in modules}
    assert not any(found.values()), found


def test_the_readmes_plain_torch_is_equivalent():
    fused, plain = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    generator = torch.Generator().manual_seed(0)
    names = {"queries": (2, 3, 16), "memory": (2, 1500, 16), "query": (3, 16), "own_key": (3, 16)}
    given = {name: F.normalize(torch.randn(shape, generator=generator), dim=-1) for name, shape in names.items()}
    given |= {"torch": torch, "B": 3, "K": 1500}
    ours, theirs = dict(given), dict(given)
    exec(fused, ours)
    exec(plain, theirs)
    for name in ("indices", "scores", "loss"):
        torch.testing.assert_close(ours[name], theirs[name])
