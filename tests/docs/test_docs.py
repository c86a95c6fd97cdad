"""Runs every command and Python block of docs/ in order in one folder, and checks that all paths they name exist."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("nvidia.dali", reason="the data pipeline needs NVIDIA DALI")

from cpr_fast.cli import main
from cpr_fast.data.synthetic import videos as synthetic

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "docs" / f"{name}.md"
    for name in ("data", "methods", "fidelity", "evaluation", "evidence", "kernels", "kinetics", "architecture")
]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is the line of its opening fence."""

    page: Path
    line: int
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """Returns the fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(page, text[: match.start()].count("\n") + 1, *match.groups()) for match in found]


def run(command: str, folder: Path) -> None:
    """Runs one command of a console block: cpr-fast in this process, other commands in a shell."""
    words = shlex.split(command)
    if words[0] == "cpr-fast":
        assert main(words[1:]) == 0
        return
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder that contains only the examples and hub/ of the checkout; `synth` writes 64x48 instead of 160x120."""
    small = functools.partial(synthetic.write_synthetic, frames=14, width=64, height=48)
    monkeypatch.setattr(synthetic, "write_synthetic", small)
    for name in ("examples", "hub"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lay_out_ucf101(folder: Path) -> None:
    """Writes UCF-101/ and its lists: synthetic videos with the official names."""
    videos = sorted((folder / "data").rglob("*.mp4"))
    videos = [path for path in videos if "flow" not in path.parts][:4]
    lists = folder / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\n2 Bowling\n")
    named = []
    for number, (video, label) in enumerate(zip(videos, ("Archery", "Bowling") * 2, strict=True)):
        path = Path(label) / f"v_{label}_g{number // 2 + 1:02d}_c01.avi"
        (folder / "UCF-101" / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(video, folder / "UCF-101" / path)
        named.append(f"{path} {('Archery', 'Bowling').index(label) + 1}\n")
    (lists / "trainlist01.txt").write_text("".join(named[:2]))
    (lists / "testlist01.txt").write_text("".join(line.split()[0] + "\n" for line in named[2:]))


@pytest.mark.slow
def test_every_command_of_the_docs_runs(folder, one_thread):
    python: dict = {}
    commands = 0
    for block in (block for page in PAGES for block in blocks_of(page)):
        if block.language == "console":
            for command in re.findall(r"^\$ (.+(?:\\\n.+)*)", block.text, re.MULTILINE):
                if "UCF-101" in command:
                    lay_out_ucf101(folder)
                if "holiday.mp4" in command:
                    shutil.copy(next((folder / "data" / "test").rglob("*.mp4")), folder / "holiday.mp4")
                try:
                    run(command, folder)
                except BaseException as error:
                    raise AssertionError(f"{block.page.name}:{block.line}: $ {command}") from error
                commands += 1
        elif block.language == "text":
            continue  # a diagram
        elif block.language == "toml":
            (folder / block.text.split("\n", 1)[0].removeprefix("# ")).write_text(block.text)
        elif block.language == "python" and (named := re.match(r"# (\w+\.py)\n", block.text)):
            (folder / named[1]).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, f"{block.page.name}:{block.line}", "exec"), python)
        else:
            raise AssertionError(f"{block.page.name}:{block.line}: a {block.language!r} block, which nothing runs")
    assert commands > 15
    for written in (
        "sample.png",
        "mining.png",
        "comparison.html",
        "found/holiday.jpg",
        "cpr.safetensors",
        "coclr.pth.tar",
    ):
        assert (folder / written).stat().st_size > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:cpr_fast|csrc|bench|tests|configs|examples|docs)/[\w./]+)`", text))
    assert paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_every_page_is_run():
    """Excludes install.md, whose commands build and install the package: the tests marked `packaging` run those."""
    assert set((ROOT / "docs").glob("*.md")) == {*PAGES, ROOT / "docs/install.md"}
