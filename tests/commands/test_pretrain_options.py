"""The arguments of `pretrain` (CONFIG, flags and settings) are told apart in any order."""

import re
import shlex

import pytest

from cpr_fast.cli import main
from cpr_fast.commands.training.pretrain import parse
from cpr_fast.errors import InputError


@pytest.mark.parametrize(
    "words",
    [
        "c.toml --data.batch-size 8 --resume --run.tensorboard --epochs 7",
        "--data.batch-size 8 c.toml --resume --run.tensorboard --epochs=7",
        "--resume --run.tensorboard c.toml --epochs 7 --data.batch-size 8",
        "--epochs 7 --resume --data.batch-size 8 --run.tensorboard c.toml",
    ],
)
def test_the_config_may_stand_anywhere(words):
    given = parse(words.split())
    assert (given.config, given.flags, given.epochs) == ("c.toml", {"--resume"}, 7)
    assert sorted(given.overrides) == ["--data.batch-size", "--run.tensorboard", "8"]


def test_values_stay_with_their_options():
    given = parse(["--data.index=a b.csv", "--model.init.rgb", "x.pt", "--run.no-tensorboard", "c", "--optim.lr", "-1"])
    assert given.config == "c"
    assert given.overrides == ["--data.index=a b.csv", "--model.init.rgb", "x.pt", "--run.no-tensorboard",
                               "--optim.lr", "-1"]  # fmt: skip
    assert parse(["c", "--data.batch_size", "8", "--schedule.cycles.0.epochs", "3"]).config == "c"
    assert parse(["--dump-memory", "c"]).overrides == ["--run.dump-memory"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--resme c.toml", "unknown option --resme; did you mean --resume"),
        ("c.toml --data.batchsize=8", "unknown option --data.batchsize; did you mean --data.batch-size"),
        ("c.toml --run.no-tensorbord", "unknown option --run.no-tensorbord"),
        ("c.toml --xyz", "unknown option --xyz; `cpr-fast pretrain --help-all` lists all"),
        ("c.toml -q", "unknown option -q"),
        ("a b", "CONFIG: expected one config, got 'a' and 'b'"),
        ("c --epochs", "--epochs: expected a number of epochs, got ''"),
        ("c --epochs -3", "--epochs: expected a number of epochs, got '-3'"),
        ("c --epochs=1.5", "--epochs: expected a number of epochs, got '1.5'"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(InputError, match=message):
        parse(words.split())


@pytest.mark.parametrize("given", ["mine.toml", "runs/mine/config.json"])
@pytest.mark.parametrize("empty", [False, True])
def test_a_run_that_is_continued_from_another_folder_is_found_beside_its_recipe(
    tmp_path, monkeypatch, capsys, given, empty
):
    """The option that the error names leads to the run, so that the next error is about its videos."""
    work, other = tmp_path / "my work", tmp_path / "other"
    (work / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    (work / "runs" / "mine" / "checkpoints" / "last.pt").touch()
    other.mkdir()
    if empty:
        (other / "runs" / "mine").mkdir(parents=True)
    (work / "index.csv").write_text("no index")
    (work / "mine.toml").write_text("data.index = 'index.csv'\nrun.out = 'runs/mine'\n")
    (work / "runs" / "mine" / "config.json").write_text(
        f'{{"data": {{"index": "{work}/index.csv"}}, "run": {{"out": "runs/mine"}}}}'
    )
    monkeypatch.chdir(other)
    assert main(["pretrain", str(work / given), "--resume"]) == 2
    said = capsys.readouterr().err
    assert f"run.out: expected the folder of a run to continue, but '{other}/runs/mine' " in said
    assert ("holds no checkpoint" if empty else "does not exist") in said
    assert "run.out is relative to the working directory" in said
    option = shlex.split(re.search("add (--run.out .*)", said)[1])
    assert option == ["--run.out", str(work / "runs" / "mine")]
    assert main(["pretrain", str(work / given), "--resume", *option]) == 2
    assert "index.csv" in capsys.readouterr().err
