"""Names of files and folders: paths that `index` writes lead to the same file from any folder and through any link."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.videos.odd_videos import write_plain

from cpr_fast.cli import main
from cpr_fast.data.index.build import IndexOptions, build_index, write_index
from cpr_fast.data.index.index import COLUMNS, Index, IndexFileError, Video
from cpr_fast.data.storage.media import read_frames

NAMES = ["a,b", 'q"uote', "n\nl", "c\rr", "-dash", "#hash", "http:x", " lead", "trail ", "t\tab", "semi;x", "%03d",
         "ä", "\u2028line", "~", "$HOME", "*", "[a]", "x" * 240, "a\\b", "'", "\ufeffmark"]  # fmt: skip
BYTES = st.binary(min_size=1, max_size=20).filter(lambda b: not set(b) & set(b"\0/") and b not in (b".", b".."))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_plain(tmp_path_factory.mktemp("video") / "v.mp4", 5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.lists(BYTES, min_size=1, max_size=4), st.lists(BYTES, max_size=2))
def test_any_path_survives_the_index(tmp_path_factory, names, folders):
    """File names may consist of any bytes, as Linux allows."""
    home = tmp_path_factory.mktemp("home")
    path = home.joinpath(*map(os.fsdecode, folders), *map(os.fsdecode, names[1:]), f"_{os.fsdecode(names[0])}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    csv_path = home / "lists" / "index.csv"
    Index([Video(path, "c", "s", "train", 5, 25.0, 64, 48)]).save(csv_path)
    assert os.path.samefile(Index.load(csv_path)[0].path, path)


def test_odd_names_are_indexed_and_read(tmp_path, video, monkeypatch):
    (tmp_path / "c").mkdir()
    for name in NAMES:
        os.link(video, tmp_path / "c" / f"{name}.mp4")
    for folder, root, out in ((tmp_path, "c", "outside.csv"), (tmp_path / "c", ".", "inside.csv")):
        monkeypatch.chdir(folder)
        assert main(["index", root, "--out", out]) == 0
        index = Index.load(out)
        assert sorted(v.path.name for v in index) == sorted(f"{name}.mp4" for name in NAMES)
        assert all(len(read_frames(v.path, [0, 4], "rgb", 5)) == 2 for v in index)


def test_names_that_cannot_be_used_are_reported(tmp_path, video):
    for name in (b"caf\xe9.mp4", b"fine.mp4", b"b.lmdb#x.mp4"):
        os.link(video, os.path.join(os.fsencode(tmp_path), name))
    report = write_index(tmp_path, tmp_path / "i.csv", IndexOptions())
    assert report["counts"]["unreadable_name"] == 2
    assert [v.path.name for v in Index.load(tmp_path / "i.csv")] == ["fine.mp4"]


@pytest.mark.parametrize("root", ["data", "link", "deep/../data", "inside/../../data"])
@pytest.mark.parametrize("out", ["i.csv", "data/i.csv", "link/i.csv", "lists/i.csv", "listlink/i.csv"])
def test_links_and_dots_on_the_way(tmp_path, video, monkeypatch, root, out):
    """`link` leads to data; `inside` to a folder elsewhere, so that inside/../.. is another folder than its text
    suggests.
    """
    for folder in ("data/c", "deep", "lists", "store/a/lists", "x/inside"):
        (tmp_path / folder).mkdir(parents=True)
    os.link(video, tmp_path / "data/c/v.mp4")
    (tmp_path / "link").symlink_to("data")
    (tmp_path / "inside").symlink_to("x/inside")
    (tmp_path / "listlink").symlink_to("store/a/lists")
    monkeypatch.chdir(tmp_path)
    if "inside" in root:
        root = "inside/../../data"
        assert os.path.isdir(root)
    build_index(root, out=out)
    found = Index.load(out)[0].path
    assert os.path.samefile(found, tmp_path / "data/c/v.mp4")
    if out in ("data/i.csv", "link/i.csv") and root in ("data", "link"):
        assert (
            (tmp_path / "data/i.csv").read_text().splitlines()[1].startswith("c/v.mp4,")
        )  # the index and its videos move together


def test_the_classes_of_an_index_are_those_of_its_folders_whatever_blanks_are_around_them(tmp_path, video):
    for number, name in enumerate(("y", "y ", " z")):
        (tmp_path / "set" / name).mkdir(parents=True)
        os.link(video, tmp_path / "set" / name / f"{number}.mp4")
    report = write_index(tmp_path / "set", tmp_path / "i.csv", IndexOptions(verify=False))
    assert report["classes"] == len(Index.load(tmp_path / "i.csv").classes) == 2
    assert [(v.path.name, v.label) for v in Index.load(tmp_path / "i.csv")] == [
        ("0.mp4", "y"), ("1.mp4", "y"), ("2.mp4", "z"),
    ]  # fmt: skip


def test_paths_that_were_written_on_windows_are_found(tmp_path, video):
    """A backslash may also belong to a name on Linux, which comes first."""
    for name in ("set/c/v.mp4", "a\\b.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(video, tmp_path / name)
    rows = "".join(f"{name},c,,,5,25,64,48,\n" for name in ("set\\c\\v.mp4", "a\\b.mp4"))
    (tmp_path / "i.csv").write_text(",".join(COLUMNS) + "\n" + rows)
    assert [v.path for v in Index.load(tmp_path / "i.csv")] == [tmp_path / "set/c/v.mp4", tmp_path / "a\\b.mp4"]
    (tmp_path / "i.csv").write_text(",".join(COLUMNS) + "\nset\\d\\v.mp4,c,,,5,25,64,48,\n")
    with pytest.raises(IndexFileError, match="column path: file .* does not exist"):
        Index.load(tmp_path / "i.csv")


def test_the_splits_are_named_where_none_is_for_training(tmp_path, video, capsys):
    (tmp_path / "i.csv").write_text(",".join(COLUMNS) + "\n" + f"{video},c,s,trian,5,25,64,48,\n")
    assert main(["init", str(tmp_path / "i.csv"), "--out", str(tmp_path / "r.toml"), "--seconds", "0"]) == 2
    assert "got 0 videos of 0 sources in split 'train'; the splits are 'trian'" in capsys.readouterr().err
