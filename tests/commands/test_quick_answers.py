"""Answers that need neither torch nor a data set are given without importing torch, NVIDIA DALI, PyAV or NumPy."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest

from cpr_fast.cli import COMMANDS
from cpr_fast.commands.inputs import require_device
from cpr_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ["torch", "nvidia.dali", "av", "numpy"]

# Runs command lines one after another in one process, and prints for each one its exit code and the heavy modules
# that have been imported so far.
PROGRAM = f"""
import contextlib, io, json, sys
from cpr_fast.cli import main
answers = []
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = main(arguments)
        except SystemExit as stopped:
            code = stopped.code
    answers.append([code, [name for name in {HEAVY!r} if name in sys.modules], errors.getvalue()])
print(json.dumps(answers))
"""

# One command line for each command. Its input file or folder does not exist; F stands for an existing file.
MISSING = [
    "doctor no.csv",
    "doctor F --config no.toml",
    "doctor F --device tpu",
    "index no --out x.csv",
    "index . --out x.csv --splits no",
    "index . --out x.csv --shard 2/2",
    "flow no.csv --out x",
    "flow F --out x --shard=3",
    "flow F --out x --device tpu",
    "show-sample no.csv --out x.png",
    "init no.csv",
    "init F --seconds -1",
    "pretrain no.toml",
    "pretrain cpr_ucf101 --data.index no.csv",
    "pretrain cpr_ucf101 --data.index F --model.init.rgb no.pt",
    "pretrain cpr_ucf101 --epochs 1",
    "explain no.toml",
    "explain cpr_ucf101 --epochs 1",
    "reproduce stages",
    "reproduce stages --index no.csv",
    "import-checkpoint no.pt --out x",
    "export no.pt --out x",
    "retrieve no.pt --index F",
    "retrieve --index F",
    "probe F --index no.csv",
    "finetune rgb=no.pt --index F",
    "search no.mp4 --index F --checkpoint F",
    "search F --index F --checkpoint F --top 0",
    "mine no.npz",
    "compare",
    "compare . no",
    "compare . --against no",
    "report no",
    "report",
]


def answers(command_lines: list[list[str]], folder: Path) -> list:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}"],
        input=json.dumps(command_lines), cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("command_lines", "expected"),
    [
        ([["--help"], ["--version"], [], ["help"], ["recipes"], ["pretrain", "--help"], ["explain", "-h"]], 0),
        ([["retreive"], ["xyz"], *([name, "--no-such-option", "1"] for name in COMMANDS)], 2),
        ([line.split() for line in MISSING], 2),
    ],
    ids=["help", "misspelt", "missing"],
)
def test_quick_answers_import_nothing_heavy(tmp_path, command_lines, expected):
    (tmp_path / "F").touch()
    for arguments, (code, heavy, errors) in zip(command_lines, answers(command_lines, tmp_path), strict=True):
        assert (code, heavy) == (expected, []), (arguments, errors)
        assert bool(errors) == (expected == 2), arguments
    assert [path.name for path in tmp_path.iterdir()] == ["F"]


# Command lines whose files exist, but cannot be used: a run folder that is full, rows of videos that are missing, an
# index of one video, recipes that cannot be read.
UNUSABLE = [
    "pretrain r.toml --run.out full",
    "pretrain r.toml --run.out new --data.index gone.csv",
    "pretrain r.toml --run.out new --data.index F",
    "pretrain r.toml --run.out new",
    "pretrain broken.toml",
    "explain broken.toml",
    "init gone.csv",
    "init few.csv",
    "flow gone.csv --out new",
    "flow few.csv --out F",
    "flow few.csv --out new --storage lmdb",
    "index . --out new.csv --layout ucf101",
    "index . --out new.csv --splits full",
    "pretrain r.toml --run.out F",
    "pretrain r.toml --run.out new --run.device tpu",
    "show-sample gone.csv --out new.png",
    "show-sample few.csv --out new.png --config broken.toml",
    "retrieve F --index gone.csv",
    "probe F --index gone.csv",
    "probe F --index split.csv --config broken.toml",
    "finetune F --index gone.csv",
    "search v.mp4 --index gone.csv --checkpoint F",
    "doctor few.csv --config broken.toml",
    "reproduce stages --index gone.csv",
]


def test_what_is_wrong_with_the_files_is_said_before_torch_is_imported(tmp_path):
    header = "path,label,source,split,num_frames,fps,width,height,flow_path"
    for name, row in {"gone": "gone.mp4,a,s,train", "few": "v.mp4,a,s,", "split": "v.mp4,a,s,train"}.items():
        (tmp_path / f"{name}.csv").write_text(f"{header}\n{row},40,25,64,48,\n")
    (tmp_path / "full" / "checkpoints").mkdir(parents=True)
    for name in ("F", "v.mp4", "full/checkpoints/last.pt"):
        (tmp_path / name).touch()
    (tmp_path / "r.toml").write_text("data = { index = 'few.csv', batch_size = 4 }\nmemory = { size = 8 }\n")
    (tmp_path / "broken.toml").write_text("data = {\n")
    before = sorted(tmp_path.rglob("*"))
    lines = [line.split() for line in UNUSABLE]
    for arguments, (code, heavy, errors) in zip(lines, answers(lines, tmp_path), strict=True):
        assert code == 2 and not {"torch", "nvidia.dali"} & set(heavy), (arguments, errors)
        assert errors.splitlines()[-1].startswith("cpr-fast: ") and "Traceback" not in errors, (arguments, errors)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["index", "synth"])
def test_a_command_says_what_it_does_before_its_long_imports(tmp_path, command):
    """The heavy modules cannot be imported here, so only what is printed before them is seen."""
    (tmp_path / "videos").mkdir()
    words = {"index": ["index", "videos", "--out", "i.csv"], "synth": ["synth", "made"]}[command]
    block = "import sys; sys.modules['numpy'] = None; from cpr_fast.cli import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", block, *words], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    said = {"index": "Looking for videos in videos ...", "synth": "Writing synthetic videos to made ..."}[command]
    assert done.stderr.splitlines()[0] == said


def test_a_cuda_device_needs_a_driver(monkeypatch):
    for driver, allowed in ((lambda name: None, True), (Mock(side_effect=OSError), False)):
        monkeypatch.setattr("ctypes.CDLL", driver)
        for name in ("cuda", "cuda:1"):
            with nullcontext() if allowed else pytest.raises(InputError, match=f"--device: got '{name}', but this mac"):
                require_device("--device", name)
    require_device("--device", "cpu")
    require_device("--device", "auto", "auto")
    with pytest.raises(InputError, match="--device: expected 'cpu', 'cuda' or 'cuda:N', got 'auto'"):
        require_device("--device", "auto")
