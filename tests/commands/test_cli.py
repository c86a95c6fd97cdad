"""The command line as users see it: exit codes, errors of one line, and nothing but JSON on stdout."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpr_fast.cli import COMMANDS, main
from cpr_fast.commands import options
from cpr_fast.commands.training.pretrain import parse
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.evaluate.features import recipe
from cpr_fast.runtime.interrupt import Interrupted, Stopped
from cpr_fast.runtime.metrics import read_metrics
from cpr_fast.weights.checkpoint import load_checkpoint

LONG = "x" * 5000  # a name that is too long for every file system


def run_module(*arguments):
    """Runs `python -m` with the arguments; processes get one thread each, because they may share few cores."""
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
    assert main(["pretrain", str(path), "--help"]) == 0
    assert re.search(r"--data.batch-size +13\n", capsys.readouterr().out)
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", str(path), "--help-all"])
    assert stopped.value.code == 0
    assert re.search(r"--data.batch-size INT[^-]*13", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain"], "CONFIG: expected a TOML file or the name of a recipe, got none"),
        (
            ["pretrain", "nowhere.toml"],
            "CONFIG: expected a recipe (a TOML file), but 'nowhere.toml' does not exist; "
            "`cpr-fast init INDEX.csv` writes a recipe for your videos",
        ),
        (
            ["explain", "no/where"],
            "CONFIG: expected a recipe (a TOML file), but 'no/where' does not exist, nor does the folder 'no'",
        ),
        (["pretrain", "crp_ucf101.toml"], "'crp_ucf101.toml' does not exist; did you mean the recipe 'cpr_ucf101'?"),
        (["pretrain", "."], "CONFIG: expected a recipe (a TOML file), but '.' is a folder"),
        (["pretrain", "crp_ucf101"], "did you mean the recipe 'cpr_ucf101'?"),
        (["pretrain", "config.yaml"], "expected a recipe (a TOML file), but 'config.yaml' does not exist"),
        (["pretrain", "a.toml", "b.toml"], "CONFIG: expected one config, got 'a.toml' and 'b.toml'"),
        (["pretrain", "--resme", "cpr_ucf101"], "unknown option --resme; did you mean --resume?"),
        (["pretrain", "--epoch", "3"], "unknown option --epoch; did you mean --epochs?"),
        (
            ["pretrain", "cpr_ucf101", "--data.batchsize=8"],
            "unknown option --data.batchsize; did you mean --data.batch-",
        ),
        (["pretrain", "cpr_ucf101", "--epochs", "many"], "--epochs: expected a number of epochs, got 'many'"),
        (["pretrain", "cpr_ucf101"], "data.index: expected a file, but 'ucf101/index.csv' does not exist"),
        (["pretrain", "cpr_ucf101", "--data.index", "no.csv"], "--data.index: expected a file, but 'no.csv'"),
        (["pretrain", "cpr_ucf101", "--data.index="], "data.index: expected the index of a data set"),
        (["pretrain", "cpr_ucf101", "--data.index", __file__, "--model.init.rgb=no.pt"], "--model.init.rgb: expected"),
        (["retrieve", "nowhere.pt", "--index", "nowhere.csv"], "CHECKPOINT: expected a file, but 'nowhere.pt'"),
        (["retrieve", "rgb=nowhere.pt", "--index", "nowhere.csv"], "CHECKPOINT: expected a file, but 'nowhere.pt'"),
        (["retrieve", __file__, "--index", __file__, "--clips", "0"], "--clips: expected 1 or more, got 0"),
        (["probe", __file__, "--index", __file__, "nowhere.csv"], "--index: expected a file, but 'nowhere.csv'"),
        (["finetune", __file__, "--index", __file__, "--config=no.toml"], "--config: expected a file, but 'no.toml'"),
        (["search", __file__, "--index", __file__, "--checkpoint", "no.pt"], "--checkpoint: expected a file"),
        (
            ["search", __file__, "--index", __file__, "--checkpoint", __file__, "--top", "0"],
            "--top: expected 1 or more",
        ),
        (["mine", "nowhere.npz"], "FEATURES: expected a file or a store of features, but 'nowhere.npz'"),
        (["mine", "--details", "nowhere.npz"], "FEATURES: expected a file or a store of features, but 'nowhere.npz'"),
        (["mine", "runs/x/memory/cycle-3.npz"], "`cpr-fast pretrain RECIPE --dump-memory` writes RUN/memory/cycle-N"),
        (["export", "nowhere.pt", "--out", "x"], "CHECKPOINT: expected a file, but 'nowhere.pt'"),
        (["import-checkpoint", "nowhere.pt", "--out", "x"], "FILE: expected a file, but 'nowhere.pt'"),
        (["index", "nowhere", "--out", "index.csv"], "ROOT: expected a folder or an LMDB file, but 'nowhere'"),
        (["index", ".", "--out", "index.csv", "--short-side", "8"], "--short-side: expected 16 or more, got 8"),
        (["index", ".", "--out", "index.csv", "--splits", __file__], "--splits: expected a folder"),
        (["flow", "nowhere.csv", "--out", "flow"], "INDEX: expected a file, but 'nowhere.csv' does not exist"),
        (["flow", __file__, "--out", "flow", "--shard", "3/3"], "--shard: expected i/n with 0 <= i < n, got '3/3'"),
        (["flow", "--out", "flow", "--shard=x"], "--shard: expected i/n with 0 <= i < n, got 'x'"),
        (["doctor", "nowhere.csv"], "INDEX: expected a file, but 'nowhere.csv'"),
        (["doctor", "--seconds", "nan"], "--seconds: expected 0 or more, got nan"),
        (["show-sample", "nowhere.csv", "--out", "x.png"], "INDEX: expected a file, but 'nowhere.csv'"),
        (["show-sample", __file__, "--out", "x.png", "--epoch", "0"], "--epoch: expected 1 or more, got 0"),
        (["init", "nowhere.csv"], "INDEX: expected a file, but 'nowhere.csv'"),
        (["init", __file__, "--seconds", "-1"], "--seconds: expected 0 or more, got -1.0"),
        (["init", __file__, "--out", "."], "--out: expected the name of a TOML file, but '.' is a folder"),
        (["reproduce", "stages"], "--index: expected the index to use as UCF101, got none"),
        (["reproduce", "stages", "--index", "nowhere.csv"], "--index: expected a file, but 'nowhere.csv'"),
        (["report", "nowhere"], "RUNS: expected a folder, but 'nowhere' does not exist"),
        (["report", __file__], "is a file"),
        (["report", "."], "RUNS: '.' has no metrics.jsonl; expected a folder written by `cpr-fast pretrain`"),
        (["report"], "RUNS: expected at least one run folder, got none"),
        (["init", __file__, "--minutes", "abc"], "--minutes: expected a number, got 'abc'"),
        (["init", __file__, "--epochs=2.5"], "--epochs: expected a whole number, got '2.5'"),
        (["retrieve", __file__, "--index", __file__, "--crops", "3"], "--crops: expected one of 1, 5, 10, got '3'"),
        (
            ["retrieve", __file__, "--index", __file__, "--recipe", "ppr"],
            "--recipe: expected one of paper, coclr, iic, got 'ppr'",
        ),
        (["mine", __file__, "--stages", "1", "x"], "--stages: expected a whole number, got 'x'"),
        (["mine", __file__, "--query-view", "rbg"], "--query-view: expected one of rgb, flow, got 'rbg'"),
        (["pretrain", LONG], "CONFIG: expected a TOML file or the name of a recipe, got 'xxx"),
        (["pretrain", "cpr_ucf101", "--data.index", LONG], "--data.index: expected a file, but 'xxx"),
        (["doctor", LONG], "INDEX: expected a file, but 'xxx"),
        (["index", LONG, "--out", "index.csv"], "ROOT: expected a folder or an LMDB file, but 'xxx"),
        (["report", LONG], "RUNS: expected a folder, but 'xxx"),
        (["retreive"], "unknown command 'retreive'; did you mean 'retrieve'?"),
        (["xyz"], "expected one of quickstart, doctor"),
    ],
)
def test_bad_input_is_one_named_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())  # no partially written file


def test_a_folder_near_the_right_one_is_answered_with_the_right_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    last.parent.mkdir(parents=True)
    for file in (last, tmp_path / "run" / "metrics.jsonl", tmp_path / "index.csv"):
        file.touch()
    for command in ("retrieve", "probe", "finetune"):
        for given in ("run", "rgb=run"):
            assert main([command, given, "--index", "index.csv"]) == 2
            expected = (
                "CHECKPOINT: expected a file, but 'run' is a run folder; its checkpoint is run/checkpoints/last.pt"
            )
            assert expected in capsys.readouterr().err
    assert main(["report", "run/checkpoints"]) == 2
    printed = capsys.readouterr().err
    assert "RUNS: 'run/checkpoints' has no metrics.jsonl; expected a folder written by `cpr-fast pretrain`" in printed
    assert printed.rstrip().endswith(f"; did you mean {str(tmp_path / 'run')!r}?")


@pytest.mark.parametrize("command", ["probe", "finetune"])
def test_classifiers_say_at_once_that_an_index_has_no_splits(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    Path("c.pt").touch()
    Path("index.csv").write_text("path,label,source,split\na.mp4,x,s,\nb.mp4,y,t,\n")
    assert main([command, "c.pt", "--index", "index.csv"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("cpr-fast: --index: expected videos of the splits train and test, but the column 'split'")
    assert "write train or test into each row" in printed and "needs no splits" in printed
    for text in ("\ufeffsplit;path\r\n;a.mp4\r\n", "path\tsplit\na.mp4\t \n"):  # as spreadsheets save it
        Path("index.csv").write_text(text, encoding="utf-8")
        assert main([command, "c.pt", "--index", "index.csv"]) == 2
        assert "but the column 'split' of 'index.csv' is empty" in capsys.readouterr().err
    for text in ("path,label\na.mp4,x\n", "path,split\na.mp4,train\n", ""):  # judged by the reader of the index
        Path("index.csv").write_text(text)
        assert main([command, "c.pt", "--index", "index.csv"]) == 2
        assert "expected videos of the splits" not in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "xx"), 2, "File name too long: 'xx'"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "xx"), 2, "Too many levels of symbolic links: 'xx'"),
        (MemoryError(), 1, "not enough memory: an allocation failed. Smaller values of data.batch_size"),
        (MemoryError("Unable to allocate 7 GiB"), 1, "not enough memory: Unable to allocate 7 GiB. Smaller values"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate"), 1, "not enough memory: CUDA out of memory"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you"), 1, "not enough memory: [enforce]"),
    ],
)
def test_what_the_system_refuses_is_one_line(monkeypatch, capsys, error, code, message):
    def fails(arguments):
        raise error

    monkeypatch.setattr("cpr_fast.cli._command", lambda name, arguments: fails)
    assert main(["doctor"]) == code
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_other_failures_keep_their_traceback(monkeypatch):
    def fails(arguments):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("cpr_fast.cli._command", lambda name, arguments: fails)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["doctor"])


@pytest.mark.slow
def test_torchrun_trains_on_two_processes_without_a_setting(tmp_path):
    """With the real loader and all defaults, each process takes its share of the batches; only the first one writes and
    prints.
    """
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
    assert all(row["loss"] is not None for row in steps)  # InfoNCE learns from the first step
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["processes"] == 2


def test_json_is_alone_on_stdout(tmp_path):
    done = run("synth", tmp_path / "data", "--classes", 4, "--videos", 4, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"index": str(tmp_path / "data" / "index.csv")}
    done = run("index", tmp_path / "data", "--out", tmp_path / "again.csv", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["videos"] == 24


def test_the_recipes_of_the_options_are_those_of_the_evaluation():
    assert options.RecipeName == recipe.RecipeName


@pytest.mark.parametrize("command", ["probe", "finetune"])
@pytest.mark.parametrize("option", ["--clips", "--epochs", "--batch-size"])
def test_a_classifier_names_the_option_that_is_out_of_range(tmp_path, capsys, command, option):
    (tmp_path / "c.toml").write_text("# the defaults\n")
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (tmp_path / name).write_bytes(b"not read")
    rows = ["a.mp4,one,,train,9,25,8,8,\n", "b.mp4,two,,train,9,25,8,8,\n", "c.mp4,one,,test,9,25,8,8,\n"]
    (tmp_path / "i.csv").write_text("path,label,source,split,num_frames,fps,width,height,flow_path\n" + "".join(rows))
    files = ["--index", str(tmp_path / "i.csv"), "--config", str(tmp_path / "c.toml")]
    arguments = [command, __file__, *files, option, "0"]
    assert main(arguments) == 2
    assert f"{option}: expected 1 or more, got 0" in capsys.readouterr().err


def wide_help(command: str, capsys, monkeypatch) -> str:
    """Returns the help of a command, whose lines are not broken."""
    monkeypatch.setenv("COLUMNS", "200")
    try:
        main([command, "--help"])
    except SystemExit as stopped:
        assert stopped.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_a_misspelt_option_of_any_command_suggests_the_nearest(command, capsys, monkeypatch):
    """Every option that the help lists, without one of its letters or with two exchanged; checked before all else."""
    shown = wide_help(command, capsys, monkeypatch)
    listed = set(re.findall(r"^[│ ]+(?:-h, )?(--[a-z][a-z0-9.-]+)", shown, re.M)) - {"--no-cache"}
    assert "--help" in listed or command in ("pretrain", "explain")
    for option in listed:
        middle = len(option) // 2 + 1
        for wrong in (option[:middle] + option[middle + 1 :], option[:-2] + option[-1] + option[-2], option[:-1] + "="):
            if wrong in (option, "--clip", "--split=") or (wrong.rstrip("=") in listed):
                continue
            assert main([command, wrong, "x"]) == 2, wrong
            found = re.fullmatch(r"cpr-fast: unknown option (\S+); did you mean (\S+)\?\n", capsys.readouterr().err)
            assert found and found[1] == wrong.rstrip("=") and found[2] in (option, *listed), (wrong, found)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_usage_of_a_command_and_the_error_about_a_missing_path_use_the_same_name(command, capsys, monkeypatch):
    usage = re.sub(r"\[-[^]]*\]", "", wide_help(command, capsys, monkeypatch).splitlines()[0])  # without the options
    words = [word.strip("[]") for word in usage.split()[2:]]
    name = next((word for word in words if word.isupper() and word != "OPTIONS"), "")
    assert "PATH" not in words[:2] and (name or command in ("quickstart", "recipes"))
    if name and name not in ("OUT", "TABLE"):  # these two need not exist
        assert main([command, "./no-such-path"]) == 2
        assert capsys.readouterr().err.startswith(f"cpr-fast: {name}: expected ")


def test_negative_numbers_and_switches_are_not_taken_for_misspelt_options(capsys):
    assert main(["init", __file__, "--seconds", "-1"]) == 2
    assert "--seconds: expected 0 or more, got -1.0" in capsys.readouterr().err
    assert main(["search", "no.mp4", "--no_cache", "--index", "no.csv", "--checkpoint", "no.pt"]) == 2
    assert "QUERIES: expected a file" in capsys.readouterr().err
    assert main(["retrieve", "--idx", "a.csv"]) == 2
    assert "unknown option --idx; did you mean --index?" in capsys.readouterr().err
    assert main(["index", ".", "--xyzzy"]) == 2
    assert "unknown option --xyzzy; `cpr-fast index --help` lists the options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "stop", "said"),
    [
        (["pretrain", "a b.toml", "--epochs", "8"], Interrupted(2, "after step 3; saved x"),
         "stopped by SIGINT after step 3; saved x; to continue: cd HERE && cpr-fast pretrain 'a b.toml' --epochs 8 "
         "--resume"),
        (["pretrain", "a.toml", "--resume"], Interrupted(15, "after step 3"),
         "stopped by SIGTERM after step 3; to continue: cd HERE && cpr-fast pretrain a.toml --resume"),
        (["pretrain", "a.toml"], KeyboardInterrupt(),  # before or after the first checkpoint: both must work
         "interrupted; what was finished is kept; to continue: cd HERE && cpr-fast pretrain a.toml --auto-resume"),
        (["pretrain", "a.toml", "--auto-resume"], KeyboardInterrupt(),
         "interrupted; what was finished is kept; to continue: cd HERE && cpr-fast pretrain a.toml --auto-resume"),
        (["index", "a", "--out", "b.csv"], Stopped(signal.SIGTERM),
         "stopped by SIGTERM; what was finished is kept; to continue: cd HERE && cpr-fast index a --out b.csv"),
        (["synth", "my data", "--classes", "4"], KeyboardInterrupt(),
         "interrupted; nothing was kept; to start again: cd HERE && cpr-fast synth 'my data' --classes 4"),
    ],
)  # fmt: skip
def test_a_stopped_command_prints_the_command_that_continues_it_from_any_folder(
    tmp_path, monkeypatch, capsys, given, stop, said
):
    folder = tmp_path / "my work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def stopped(arguments):
        raise stop

    monkeypatch.setattr("cpr_fast.cli._command", lambda name, arguments: stopped)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert main(given) == 128 + getattr(stop, "signum", signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err == f"cpr-fast: {said.replace('HERE', shlex.quote(str(folder)))}\n"
    if given[0] == "pretrain":  # the printed words are a command line that `pretrain` accepts
        parsed = parse(shlex.split(said.split("cpr-fast pretrain ")[1]))
        assert parsed.flags & {"--resume", "--auto-resume"} and parsed.config == given[1]
