"""The command line as a user meets it: exit codes, one-line errors, JSON on stdout and nothing else there."""

import json
import subprocess
import sys

import pytest

from cpr_fast.cli import COMMANDS, main


def run(*arguments):
    command = [sys.executable, "-m", "cpr_fast", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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


def test_unknown_setting_is_refused(tmp_path, capsys):
    path = tmp_path / "c.toml"
    path.write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", str(path), "--data.batchsize", "8"])
    assert stopped.value.code == 2
    assert "--data.batchsize" in capsys.readouterr().err


def test_json_is_alone_on_stdout(tmp_path):
    done = run("synth", tmp_path / "data", "--classes", 4, "--videos", 4, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"index": str(tmp_path / "data" / "index.csv")}
    done = run("index", tmp_path / "data", "--out", tmp_path / "again.csv", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["videos"] == 24
