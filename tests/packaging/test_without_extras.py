"""If only torch is installed, the operators work and every command says which packages to install."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cpr_fast.cli import COMMANDS
from cpr_fast.errors import TRAIN_MODULES

ROOT = Path(__file__).resolve().parents[2]

# Hides the packages of the extra [train] as if they were not installed; torch itself may look for NumPy.
WITHOUT = """
import importlib.abc, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in HIDDEN:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Hidden())
"""


def run_without(hidden: set[str], program: str) -> subprocess.CompletedProcess:
    program = WITHOUT.replace("HIDDEN", repr(hidden)) + program
    return subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True)


def command(*arguments: str) -> str:
    return f"from cpr_fast.cli import main; sys.exit(main({list(arguments)!r}))"


TRAIN = {module.partition(".")[0] for module in TRAIN_MODULES}


def test_the_extra_lists_the_packages_that_the_message_knows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in project["optional-dependencies"]["train"]]
    assert sorted(names) == sorted(TRAIN_MODULES.values())
    assert [re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]] == ["torch"]


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_every_package_that_is_imported_is_a_dependency():
    """Every import of the package is torch, or in the extra [train], or handled as optional where it is imported."""
    optional = {"onnx", "onnxscript", "apex", "amp_C", "tensorboard", "wandb", "trackio", "faiss", "ray", "h5py",
                "transformers", "lightning", "pytorch_metric_learning", "fsspec", "aiohttp", "pyarrow"}  # fmt: skip
    known = TRAIN | {"torch", "cpr_fast", "markupsafe"} | optional | sys.stdlib_module_names  # jinja2 needs markupsafe
    found = {path.name: imported_packages(path) - known for path in (ROOT / "cpr_fast").rglob("*.py")}
    assert not {name: packages for name, packages in found.items() if packages}


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "ray"])  # it only starts other commands
def test_a_command_names_what_to_install(name):
    # The help of `pretrain` and `explain` needs none of the packages; what they do needs them.
    arguments = {"pretrain": ["cpr_ucf101", "--data.index", __file__], "explain": ["cpr_ucf101"]}.get(name, ["--help"])
    done = run_without(TRAIN | {"torch"}, command(name, *arguments))
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip()
    assert line.count("\n") == 0 and 'pip install "cpr-fast[train]"' in line and "torch, numpy" in line


def test_one_missing_package_is_named_alone():
    done = run_without({"tyro"}, command("doctor"))
    assert done.returncode == 2
    assert "a package that is not installed (tyro):" in done.stderr


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_need_nothing(argument):
    done = run_without(TRAIN | {"torch"}, command(argument))
    assert done.returncode == 0 and "cpr-fast" in done.stdout and not done.stderr


def test_a_missing_module_of_ours_is_a_failure_with_its_traceback():
    program = "import cpr_fast.commands.data\nsys.modules['cpr_fast.commands.data.doctor'] = None\n" + command("doctor")
    done = run_without(set(), program)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_modules_that_are_not_built_are_one_line():
    done = run_without(set(), "sys.modules['cpr_fast._host'] = None\n" + command("flow", __file__, "--out", "flow"))
    assert done.returncode == 2
    assert "the compiled modules are not built: run `python setup.py build_ext`" in done.stderr


def test_the_operators_run_with_torch_alone():
    program = """
import torch
from cpr_fast.ops import cascade_select, mil_nce, tvl1_flow
x = torch.nn.functional.normalize(torch.ones(1, 4, 8), dim=2)
indices, _ = cascade_select(x, x, views=[0], keep=[2])
query = x[0].clone().requires_grad_()
loss = mil_nce(query, x[0], x[0], positives=indices)
loss.backward()
flow = tvl1_flow(torch.zeros(2, 16, 16, dtype=torch.uint8))
print(indices.tolist(), round(float(loss), 4), tuple(flow.shape))
"""
    done = run_without(TRAIN, program)
    assert done.returncode == 0, done.stderr
    # Four equal entries and the own key, of which the own key and two slots are positives: log(5 / 3).
    assert done.stdout.strip() == "[[0, 1], [0, 1], [0, 1], [0, 1]] 0.5108 (1, 2, 16, 16)"
