"""Which settings `doctor` judges an index with, and what it says about a file that is no index."""

import json
import os

import numpy as np
import pytest
from support.numbered_videos import write_video

pytest.importorskip("nvidia.dali")

from cpr_fast.cli import main
from cpr_fast.config import DataConfig
from cpr_fast.data.flow import estimate
from cpr_fast.data.index.index import Index, IndexFileError, NotAnIndexError
from cpr_fast.doctor import checks
from cpr_fast.doctor.recipe import choose_recipe
from cpr_fast.pretrain.run.videos import training_videos
from cpr_fast.wording import counted

HEADER = "path,label,source,split,num_frames,fps,width,height,flow_path"
RECIPE = """# written by `cpr-fast init`
[data]
index = "{index}"
batch_size = 2
[memory]
size = {size}
[schedule]
cycles = [{{ view = "rgb", epochs = 20, mining = "none" }}]
[mining]
top_k = 1
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with `set/index.csv` of eight videos without flow; neither the codecs are checked nor the
    time of their flow is measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "_measure", lambda *_: estimate._Cost(1e-4, 5e-5, 1.0))
    monkeypatch.setattr(
        checks, "codecs", lambda device, findings: [{"codec": "h264", "pyav": "exact", "dali": "exact"}]
    )
    pictures = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3)).astype(np.uint8)
    (tmp_path / "set").mkdir()
    video = write_video(tmp_path / "v", pictures, "h264-bframes")
    for i in range(8):
        os.link(video, tmp_path / "set" / f"{i}.mp4")
    write_index(tmp_path / "set" / "index.csv", ["train"] * 8)
    return tmp_path


def write_index(path, splits):
    rows = [f"{i}.mp4,c,s{i},{split},20,25,64,48," for i, split in enumerate(splits)]
    path.write_text("\n".join([HEADER, *rows]) + "\n")


def doctor(capsys, *arguments) -> tuple[str, int]:
    """Returns what the command prints, without the frames of tables, and its exit code."""
    try:
        code = main(["doctor", *arguments, "--seconds", "0"])
    except SystemExit as stopped:
        code = stopped.code
    return capsys.readouterr().out, code


@pytest.mark.parametrize(
    ("place", "index"),
    [("set/mine.toml", "index.csv"), ("recipe.toml", "set/index.csv"), ("r.toml", "./set/../set/index.csv")],
)
def test_the_recipe_of_the_index_is_judged(folder, capsys, place, index):
    (folder / place).write_text(RECIPE.format(index=index, size=2))
    (folder / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    (folder / "other.toml").write_text(RECIPE.format(index="other.csv", size=2))
    (folder / "damaged.toml").write_text("[data\n")
    out, code = doctor(capsys, "set/index.csv")
    assert code == 0
    assert (
        f"The data are judged with the settings of {place}, which names this index; to judge another recipe: --config"
        in out
    )
    assert "never fills" not in out and "no flow, which" not in out  # as with the defaults, which have flow cycles
    assert out.endswith(f"\nnext: cpr-fast pretrain {place}\n")


def test_without_a_recipe_the_settings_of_init_are_judged_and_their_advice_is_not_refused(folder, capsys):
    for command in ("cpr-fast init set/index.csv", "cpr-fast init set/index.csv --out index.toml"):
        out, code = doctor(capsys, "set/index.csv")
        assert (
            code == 0
            and (
                "The data are judged with the settings that `cpr-fast init` would choose: no recipe names this index; "
                f"`{command}` writes one\n"
            )
            in out
        )
        assert "of these settings needs" not in out and "Set " not in out and "set " not in out.replace("set/", "")
        assert out.endswith(f"\nnext: {command}\n")
        (folder / "recipe.toml").write_text("# a recipe of other videos")
    assert main([*command.split()[1:], "--seconds", "0"]) == 0


@pytest.mark.parametrize("videos", [1, 6, 7])
def test_too_few_videos_are_the_one_thing_to_change_in_the_words_of_init(folder, capsys, caplog, videos):
    write_index(folder / "set" / "index.csv", [""] * videos)
    out, code = doctor(capsys, "set/index.csv")
    got = f"{counted(videos, 'video')} of {counted(videos, 'source')}"
    reason = f"expected at least 8 training videos of at least 2 sources, got {got}"
    assert code == 1 and f"error (a command fails): too few videos for pretraining: {reason}\n" in out
    assert "-> add videos, then list them again with `cpr-fast index`\n" in out and "settings" not in out
    assert "cpr-fast init" not in out.replace("`init` refuses", "") and "batch_size" not in out
    assert out.endswith("\nnext: correct the problem of number 1, then run this command again\n")
    assert main(["init", "set/index.csv", "--seconds", "0"]) == 2 and reason in capsys.readouterr().err
    (folder / "r.toml").write_text(RECIPE.format(index="set/index.csv", size=2))
    out, code = doctor(capsys, "set/index.csv")
    assert f"warning (changes results): too few videos for pretraining: {reason}\n" in out
    assert code == (1 if videos == 1 else 0)  # one source is an error of its own
    caplog.clear()
    assert len(training_videos(DataConfig(index="set/index.csv", split=""))) == videos
    assert caplog.messages == [f"Warning: data.index: {reason}; a run on fewer shows only that everything works"]


def test_of_several_recipes_none_is_chosen(folder, capsys):
    (folder / "a.toml").write_text(RECIPE.format(index="set/index.csv", size=2))
    (folder / "set" / "b.toml").write_text(RECIPE.format(index="index.csv", size=2))
    out, _ = doctor(capsys, "set/index.csv")
    assert "several recipes name this index (set/b.toml, a.toml); --config chooses one\n" in out
    assert out.endswith("\nnext: cpr-fast doctor set/index.csv --config set/b.toml\n")
    out, _ = doctor(capsys, "set/index.csv", "--config", "a.toml")
    assert "The data are judged with the settings of a.toml (--config)" in out
    assert out.endswith("\nnext: cpr-fast pretrain a.toml\n")


def test_a_recipe_of_init_that_cannot_be_read_is_an_error(folder, capsys):
    text = RECIPE.format(index="set/index.csv", size=2).replace("batch_size", "batchsize")
    (folder / "recipe.toml").write_text(text)
    out, code = doctor(capsys, "set/index.csv")
    assert code == 1 and "recipe.toml" in out and "batchsize" in out and "`cpr-fast init` would choose" in out
    assert out.endswith("\nnext: correct the problem of number 1, then run this command again\n")


def test_without_an_index_the_next_step_makes_one(folder, capsys):
    out, _ = doctor(capsys)
    assert "The data are" not in out and out.endswith("\nnext: cpr-fast index VIDEOS --out index.csv\n")
    assert choose_recipe(None, None, []).config is None


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        (
            [""] * 8,
            "no train and no test split: training uses all videos, `retrieve` lets every video search among",
        ),
        (["train"] * 8, "no test split: `retrieve` lets every video search among those of all other sources"),
        (["train"] * 7 + ["test"], ""),
    ],
)
def test_a_missing_split_is_named_with_what_it_is_for(folder, capsys, splits, said):
    write_index(folder / "set" / "index.csv", splits)
    out, _ = doctor(capsys, "set/index.csv", "--json")
    texts = [f["text"] + f["advice"] for f in json.loads(out)["findings"] if " split: " in f["text"]]
    assert len(texts) == bool(said)
    for text in texts:
        assert said in text and "`probe` and `finetune` cannot run" in text and "fill the column" in text


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("text.txt", b"hello\nworld\n", "a text file that begins with 'hello'"),
        ("empty.csv", b"", "an empty file"),
        ("other.csv", b"a,b,c\n1,2,3\n", "a text file that begins with 'a,b,c'"),
        ("recipe.toml", b"[data]\nindex = 'x'\n", "a TOML file, such as a recipe"),
        ("v.mp4", b"\0\0\0 ftypisom", "a video"),
        ("last.pt", b"PK\3\4\0\0", "a checkpoint"),
    ],
)
def test_a_file_that_is_no_index_is_named_and_never_to_be_overwritten(folder, capsys, name, content, what):
    (folder / name).write_bytes(content)
    with pytest.raises(NotAnIndexError) as refused:
        Index.load(name)
    assert str(refused.value) == (
        f"{name}: expected an index (a CSV file written by `cpr-fast index`, whose first line is {HEADER}), got {what}"
    )
    out, code = doctor(capsys, name)
    assert code == 1 and what in out and f"--out {name}" not in out
    assert "name the index of the videos; `cpr-fast index FOLDER --out index.csv` makes one" in out
    assert main(["init", name, "--out", "new.toml"]) == 2 and what in capsys.readouterr().err


def test_a_damaged_index_is_still_called_an_index(folder):
    path = folder / "index.csv"
    path.write_text("path,label\na.mp4,x\n")
    with pytest.raises(IndexFileError, match="missing column 'source', 'split'") as refused:
        Index.load(path)
    assert not isinstance(refused.value, NotAnIndexError)
