"""Files of another kind where a command expects an index, a checkpoint, a run folder or a file at all."""

import os
import shutil

import pytest
import torch
from support.small_runs import run, settings
from support.stand_in_loader import RandomLoader
from support.videos.odd_videos import write_plain

pytest.importorskip("nvidia.dali")

from cpr_fast.cli import main
from cpr_fast.commands.inputs import with_home
from cpr_fast.data.index.index import COLUMNS, Index
from cpr_fast.models import build_encoder
from cpr_fast.weights.checkpoint import load_checkpoint, save_checkpoint
from cpr_fast.weights.reading import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Paths that exist, in a way, but are no regular file; reading a pipe without a writer would never end."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("nowhere", "link")
    os.symlink("circle", "circle")
    (tmp_path / "folder").mkdir()


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("pipe", "is a pipe, a device or a socket"),
        ("/dev/zero", "is a pipe, a device or a socket"),
        ("link", "is a link to 'nowhere', which leads to no file"),
        ("circle", "is a link to 'circle', which leads to no file"),
        ("folder", "is a folder"),
        ("none", "does not exist"),
    ],
)
@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["mine"], "FEATURES"),
        (["export", "--out", "x"], "CHECKPOINT"),
        (["init"], "INDEX"),
        (["retrieve", "--index", "none.csv"], "CHECKPOINT"),
        (["search", "--index", __file__, "--checkpoint", __file__], "QUERIES"),
        (["pretrain", "cpr_ucf101", "--data.index"], "--data.index"),
    ],
)
def test_what_is_no_file_is_described(places, capsys, words, option, path, what):
    arguments = [*words, path] if words[0] == "pretrain" else [words[0], path, *words[1:]]
    assert main(arguments) == 2
    expected = "a file or a store of features" if option == "FEATURES" else "a file"
    assert f"{option}: expected {expected}, but {path!r} {what}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "option", "path", "close"),
    [
        ("pretrain", "CONFIG", "recipes.toml", "recipe.toml"),
        ("pretrain", "CONFIG", "recipe", "recipe.toml"),
        ("pretrain", "CONFIG", "recipe.tml", "recipe.toml"),
        ("pretrain", "CONFIG", "recipes.tml", "recipe.toml"),
        ("pretrain", "CONFIG", "recipy", "recipe.toml"),
        ("pretrain", "CONFIG", "runs/mine/config.jsn", "runs/mine/config.json"),
        ("explain", "CONFIG", "run/mine/config.toml", "runs/mine/config.json"),
        ("doctor --config", "--config", "recipe.tml", "recipe.toml"),
        ("pretrain recipe.toml --data.index", "--data.index", "index.cvs", "index.csv"),
        ("pretrain recipe.toml --resume --run.out", "run.out", "runs/mime", "runs/mine"),
        ("pretrain recipe.toml --data.index", "--data.index", "indx.csv", "index.csv"),
        ("explain", "CONFIG", "./recipee.toml", "./recipe.toml"),
        ("doctor", "INDEX", "idnex.csv", "index.csv"),
        ("init", "INDEX", "Index.csv", "index.csv"),
        ("index --out new.csv", "ROOT", "video", "videos"),
        ("index --out new.csv", "ROOT", "video/a", "videos/a"),
        ("retrieve --index index.csv", "CHECKPOINT", "runs/min/checkpoints/last.pt", "runs/mine/checkpoints/last.pt"),
        ("export --out new.onnx", "CHECKPOINT", "runs/mine/checkpoints/lst.pt", "runs/mine/checkpoints/last.pt"),
        ("report", "RUNS", "runs/mien", "runs/mine"),
        ("compare runs/mine", "RUNS", "run/mine", "runs/mine"),
        ("mine", "FEATURES", "runs/mine/checkpoints/last.npz", ""),
        ("init", "INDEX", "other.csv", ""),
    ],
)
def test_a_missing_path_is_called_missing_and_a_similar_one_is_named(
    tmp_path, monkeypatch, capsys, words, option, path, close
):
    monkeypatch.chdir(tmp_path)
    for name in (
        "runs/mine/checkpoints/last.pt",
        "runs/mine/config.json",
        "runs/mine/metrics.jsonl",
        "videos/a/v.mp4",
        "index.csv",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    rows = [f"videos/a/v{i}.mp4,,,,9,25,64,48," for i in range(9)]
    for i in range(9):
        (tmp_path / "videos" / "a" / f"v{i}.mp4").touch()
    (tmp_path / "index.csv").write_text("\n".join([",".join(COLUMNS), *rows]) + "\n")
    (tmp_path / "recipe.toml").write_text(
        "[data]\nindex = 'index.csv'\nbatch_size = 2\nflow = 'on_the_fly'\n[memory]\nsize = 6\n"
    )
    command, *options = words.split()
    ends = bool(options) and (command == "pretrain" or options[-1] == "--config")
    assert main([command, *options, path] if ends else [command, path, *options]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"cpr-fast: {option}: expected ") and f"{path!r}" in last
    assert ("; did you mean " in last) == bool(close) and (not close or f"did you mean {close!r}?" in last)
    assert " does not exist" in last or path in ("recipe", "recipy")


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """A run, and a checkpoint such as `finetune` writes: with encoders, but without the state of pretraining."""
    folder = run(settings(tmp_path_factory.mktemp("finetuned") / "run"))
    payload = load_checkpoint(folder / "checkpoints" / "last.pt")
    encoder = build_encoder(settings(folder).model).state_dict()
    keep = {"config": payload["config"], "encoders": {"flow": encoder}, "head": {}, "epoch": 2, "best": None}
    return folder, save_checkpoint(folder.parent / "finetuned.pt", keep)


def test_a_finetuned_checkpoint_is_exported(finetuned, tmp_path):
    from safetensors.torch import load_file

    assert main(["export", str(finetuned[1]), "--out", str(tmp_path / "e.safetensors")]) == 0
    written = load_file(tmp_path / "e.safetensors")
    (expected,) = load_checkpoint(finetuned[1])["encoders"].values()
    assert written.keys() == {f"flow.{name}" for name in expected}
    assert all(torch.equal(written[f"flow.{name}"], value) for name, value in expected.items())


@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_run_does_not_resume_from_a_checkpoint_of_another_kind(finetuned, tmp_path, resume):
    out = shutil.copytree(finetuned[0], tmp_path / "run")
    shutil.copyfile(finetuned[1], out / "checkpoints" / "last.pt")
    before = sorted(path.name for path in (out / "checkpoints").iterdir())
    with pytest.raises(CheckpointError, match=r"--resume: .*last.pt' .* has no cycle_state, .*--model.init.rgb"):
        run(settings(out), RandomLoader, resume=resume)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == before


def test_the_report_of_an_index_without_a_readable_video_says_so(finetuned, tmp_path, capsys):
    row = ["gone.mp4", "a", "s", "train", "9", "25", "64", "48", ""]
    (tmp_path / "index.csv").write_text(f"{','.join(COLUMNS)}\n{','.join(row)}\n")
    assert main(["report", str(finetuned[0]), "--index", str(tmp_path / "index.csv")]) == 2
    assert "index.csv: no video of this index can be read here: " in capsys.readouterr().err


@pytest.mark.parametrize("out", ["--out=~/i.csv", "--out ~/i.csv"])
def test_the_home_folder_where_no_shell_replaces_it(tmp_path, monkeypatch, out, capsys):
    """A shell leaves `~` after an equals sign and in quotes; job schedulers start programs without one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_plain(tmp_path / "set" / "a~b.mp4", 20)
    assert main(["index", "~/set", *out.split()]) == 0
    assert [video.path for video in Index.load(tmp_path / "i.csv")] == [tmp_path / "set" / "a~b.mp4"]
    assert not (tmp_path / "~").exists()
    assert with_home(["pretrain", "r.toml", "--run.out=~/x", "rgb=~/a.pt", "./~/b"]) == [
        "pretrain", "r.toml", f"--run.out={tmp_path}/x", f"rgb={tmp_path}/a.pt", "./~/b",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("index $HOME/set --out i.csv", "argument: expected a path, got '$HOME/set', in which no environment variable"),
        ("index set --out=$HOME/i.csv", "--out: expected a path, got '$HOME/i.csv', in which no environment variable"),
        ("index set --out /data/${USER}/i.csv", "--out: expected a path, got '/data/${USER}/i.csv', in which no "),
        ("retrieve rgb=$RUN/a.pt --index i.csv", "argument: expected a path, got '$RUN/a.pt', in which no environment"),
    ],
)
def test_an_environment_variable_that_no_shell_replaced_is_named(tmp_path, monkeypatch, command, message, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "suffix"),
    [
        ("index set --out new.toml", ".csv"),
        ("index set --out new.mp4", ".csv"),
        ("init i.csv --out new.csv --seconds 0", ".toml"),
        ("init i.csv --out other.csv --seconds 0 --force", ".toml"),
        ("report run --out new.csv", ".html"),
    ],
)
def test_no_file_is_written_under_the_suffix_of_another_kind(tmp_path, monkeypatch, capsys, command, suffix):
    monkeypatch.chdir(tmp_path)
    write_plain(tmp_path / "set" / "a.mp4", 20)
    (tmp_path / "run").mkdir()
    for name in ("i.csv", "other.csv", "run/metrics.jsonl"):
        (tmp_path / name).write_text("kept")
    assert main(command.split()) == 2
    name = command.split("--out ")[1].split()[0]
    assert f"--out: expected a name that ends in {suffix}, got {name!r}" in capsys.readouterr().err
    assert not list(tmp_path.glob("new*")) and (tmp_path / "other.csv").read_text() == "kept"


@pytest.mark.parametrize("command", ["retrieve", "probe", "finetune"])
def test_an_index_that_is_given_twice_is_refused(tmp_path, monkeypatch, capsys, command):
    """The results of several indexes give a deviation, which would be 0."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "i.csv", "j.csv"):
        (tmp_path / name).touch()
    assert main([command, "a.pt", "--index", "i.csv", "j.csv", "./i.csv"]) == 2
    assert "--index: expected every index once, got './i.csv' again" in capsys.readouterr().err


def test_a_path_that_begins_with_a_dash_can_be_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-set").mkdir()
    assert main(["index", "-set", "--out", "i.csv"]) == 2
    assert "unknown option -set; a path that begins with a dash is written './-set'" in capsys.readouterr().err
    assert with_home(["index", "--out=-x.csv", "--minutes=-3", "--x=-1e-3"]) == [
        "index", "--out=./-x.csv", "--minutes=-3", "--x=-1e-3"
    ]  # fmt: skip
