"""The command line as a user meets it: exit codes, one-line errors, JSON on stdout and nothing else there."""

import json
import os
import subprocess
import sys

import pytest

from cpr_fast.cli import COMMANDS, main
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.runtime.metrics import read_metrics
from cpr_fast.weights.checkpoint import load_checkpoint


def run_module(*arguments):
    """`python -m` of the arguments; processes that share few cores get one thread each."""
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def run(*arguments):
    return run_module("cpr_fast", *arguments)


def test_help_lists_every_command():
    done = run("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert command in done.stdout


def test_config_settings_are_in_the_help_with_the_files_values(tmp_path, capsys):
    path = tmp_path / "c.toml"
    path.write_text("[data]\nbatch_size = 13\n")
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", str(path), "--help"])
    assert stopped.value.code == 0
    assert "13" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "nowhere.toml"], "'nowhere.toml' does not exist"),
        (["pretrain", "config.yaml"], "expected a .toml file, got 'config.yaml'"),
        (["retrieve", "nowhere.pt", "--index", "nowhere.csv"], "nowhere"),
        (["index", "nowhere", "--out", "index.csv"], "nowhere"),
        (["flow", "nowhere.csv", "--out", "flow"], "nowhere.csv"),
        (["flow", "nowhere.csv", "--out", "flow", "--shard", "3/3"], "expected i/n with 0 <= i < n, got '3/3'"),
        (["report", "nowhere"], "nowhere"),
        (["report"], "expected at least one run folder"),
    ],
)
def test_bad_input_is_one_named_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())  # nothing half-written


@pytest.mark.parametrize(
    "arguments",
    [["pretrain", "folder.toml"], ["synth", "file/data"], ["quickstart", "--out", "file"], ["mine", "folder.toml"]],
)
def test_files_in_the_place_of_folders_are_bad_input(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "file").touch()
    assert main(arguments) == 2
    assert arguments[-1] in capsys.readouterr().err.strip().splitlines()[-1]


def test_unknown_setting_is_refused(tmp_path, capsys):
    path = tmp_path / "c.toml"
    path.write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", str(path), "--data.batchsize", "8"])
    assert stopped.value.code == 2
    assert "--data.batchsize" in capsys.readouterr().err


def test_torchrun_trains_on_two_processes_without_a_setting(tmp_path):
    """The real loader, every default: each process takes its share of the batches, the first one writes and prints."""
    pytest.importorskip("nvidia.dali", reason="the data pipeline needs NVIDIA DALI")
    index = write_synthetic(tmp_path / "data", classes=4, videos=4, frames=8, width=64, height=48, progress=False)
    path = tmp_path / "c.toml"
    path.write_text(f"""
        data = {{ index = "{index}", frames = 5, size = 32, batch_size = 4 }}
        model = {{ width = 0.125 }}
        memory = {{ size = 8 }}
        schedule = {{ cycles = [{{ view = "rgb", epochs = 2, mining = "none" }}] }}
        run = {{ out = "{tmp_path / "run"}", device = "cpu" }}
    """)
    done = run_module(
        "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "cpr_fast", "pretrain", path, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"run": str(tmp_path / "run")}
    steps = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [0, 1, 2, 3]  # 16 training videos: two steps of 2 x 4
    assert [row["loss"] is None for row in steps] == [True, False, False, False]
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["processes"] == 2


def test_json_is_alone_on_stdout(tmp_path):
    done = run("synth", tmp_path / "data", "--classes", 4, "--videos", 4, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"index": str(tmp_path / "data" / "index.csv")}
    done = run("index", tmp_path / "data", "--out", tmp_path / "again.csv", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["videos"] == 24
