"""Text lists of videos: paths and URLs, classes, splits, and lines that name nothing."""

from __future__ import annotations

import pytest
from support.data_sets.tar_files import write_tar
from support.videos.odd_videos import place, write_plain

from cpr_fast.cli import main
from cpr_fast.data.index.build import IndexOptions, write_index
from cpr_fast.data.index.formats.lists import list_lines
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_plain(tmp_path_factory.mktemp("video") / "v.mp4", 20)


def write_list(path, *lines: str):
    """Writes a list and returns its path."""
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_list_names_paths_that_are_relative_to_it(tmp_path, video):
    names = ["a.mp4", "deep/er/a.mp4", "with blanks/b 2.mp4", "no_suffix"]
    place(video, *(tmp_path / "set" / name for name in names))
    (tmp_path / "elsewhere").mkdir()
    place(video, tmp_path / "elsewhere" / "c.mp4")
    file = write_list(tmp_path / "set" / "files.txt", "# videos", *names, "", f'"{tmp_path / "elsewhere" / "c.mp4"}"')
    assert main(["index", str(file), "--layout", "list", "--out", str(tmp_path / "i.csv")]) in (0, None)
    index = Index.load(tmp_path / "i.csv")
    expected = sorted([*(tmp_path / "set" / name for name in names), tmp_path / "elsewhere" / "c.mp4"])
    assert sorted(video.path.resolve() for video in index) == expected
    assert not index.classes and len(set(index.source_ids.tolist())) == 5 and not index.has_splits


def test_classes_and_splits_of_lists(tmp_path, video):
    names = ["a.mp4", "b c.mp4", "v_X_g01_c02.mp4", "v_X_g01_c03.mp4", "d.mp4"]
    place(video, *(tmp_path / name for name in names))
    write_list(tmp_path / "k_train_list.txt", "a.mp4 10", "b c.mp4 9", "v_X_g01_c02.mp4\tX", "v_X_g01_c03.mp4,X")
    write_list(tmp_path / "k_val_list.txt", "d.mp4 10", "missing.mp4 3")
    found = list_lines(tmp_path)
    assert [(v.path.name, v.label, v.source, v.split) for v in found.videos] == [
        ("a.mp4", "10", "a.mp4", "train"), ("b c.mp4", "9", "b c.mp4", "train"),
        ("v_X_g01_c02.mp4", "X", "v_X_g01", "train"), ("v_X_g01_c03.mp4", "X", "v_X_g01", "train"),
        ("d.mp4", "10", "d.mp4", "val"),
    ]  # fmt: skip
    assert found.classes == ["10", "9", "X"]
    assert [(p.kind, p.reason) for p in found.problems] == [("missing", "listed in k_val_list.txt:2, does not exist")]
    (tmp_path / "k_train_list.txt").write_text("a.mp4 10\nb c.mp4 9\n")
    assert list_lines(tmp_path).classes == ["9", "10"]


def test_lists_name_urls_and_tar_files(tmp_path):
    write_tar(tmp_path / "s.tar", {"x.mp4": b"1"})
    file = write_list(tmp_path / "l.txt", "s.tar", "https://host/a.mp4?key=1%2F2 run", ["s3://bucket/b", "c.mp4"][0])
    found = list_lines(file)
    assert [(v.path.name, v.label, v.source) for v in found.videos] == [
        ("x.mp4", "", "s.tar/x"), ("a.mp4?key=1%2F2", "run", "https://host/a.mp4"), ("b", "", "s3://bucket/b"),
    ]  # fmt: skip
    write_list(file, "https://host//a.mp4")
    with pytest.raises(InputError, match=r"l.txt:1: expected a URL without an empty part"):
        list_lines(file)


def test_lists_that_name_nothing_are_refused(tmp_path):
    write_list(tmp_path / "empty.txt", "# nothing")
    with pytest.raises(InputError, match="ROOT: expected a list that names videos"):
        list_lines(tmp_path / "empty.txt")
    for root, message in ((tmp_path / "none.txt", "ROOT: --layout list expects a text file"),
                          ("https://host/list.txt", "ROOT: --layout list expects a text file")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            write_index(type(tmp_path)(root), tmp_path / "i.csv", IndexOptions("list"))
    with pytest.raises(InputError, match=r"got '.*empty.txt'; --layout list reads lists"):
        write_index(tmp_path / "empty.txt", tmp_path / "i.csv", IndexOptions())
    with pytest.raises(InputError, match="found no video"):
        write_index(write_list(tmp_path / "gone.txt", "gone.mp4"), tmp_path / "i.csv", IndexOptions("list"))
