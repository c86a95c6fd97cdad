"""Folders without lists: which levels are the split and the class, which files are ignored, and how these are
reported.
"""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.machine.permissions import without_permission
from support.videos.odd_videos import place, write_plain

from cpr_fast.cli import main
from cpr_fast.data.index.build import IndexOptions, write_index
from cpr_fast.data.index.index import Index, IndexFileError
from cpr_fast.data.storage.record_writer import RecordWriter
from cpr_fast.data.storage.records import split_record


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_plain(tmp_path_factory.mktemp("video") / "v.mp4", 20)


LEVELS = {
    "flat": (["a.mp4", "b.mp4"], [("", ""), ("", "")], "no folder names a split; no folder names a class"),
    "classes": (["walk/a.mp4", "run/a.mp4"], [("run", ""), ("walk", "")], "the first folder level is the class"),
    "nested": (["walk/s1/a.mp4", "run/s/t/a.mp4"], [("run", ""), ("walk", "")], "deeper folders are ignored"),
    "splits": (["train/walk/a.mp4", "test/walk/a.mp4"], [("walk", "test"), ("walk", "train")],
               "the first folder level is the split; the second folder level is the class"),
    "splits of other names": (["Training/walk/a.mp4", "VALID/walk/a.mp4"], [("walk", "train"), ("walk", "val")],
                              "the first folder level is the split"),
    "splits without classes": (["train/a.mp4", "test/a.mp4"], [("", "test"), ("", "train")], "no folder names a class"),
    "a third split": (["train/walk/a.mp4", "test/walk/a.mp4", "extra/walk/a.mp4"],
                      [("walk", "extra"), ("walk", "test"), ("walk", "train")], "the first folder level is the split"),
    "splits in two cases": (["train/walk/a.mp4", "Train/walk/a.mp4", "TEST/walk/a.mp4"],
                            [("walk", "test"), ("walk", "train"), ("walk", "train")], "folder level is the split"),
    "most videos in no folder": (["a.mp4", "b.mp4", "2019/c.mp4"], [("", ""), ("", ""), ("", "")],
                                 "no folder names a class, because most videos lie in none"),
    "as many in folders as outside": (["a.mp4", "walk/b.mp4"], [("", ""), ("walk", "")],
                                      "is the class (--no-classes if it is not)"),
    "most videos of the splits in no folder": (["train/a.mp4", "test/b.mp4", "test/x/c.mp4"],
                                               [("", "test"), ("", "test"), ("", "train")], "because most videos"),
    "a class named train": (["train/a.mp4", "bus/a.mp4"], [("bus", ""), ("train", "")], "no folder names a split"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEVELS)
def test_levels_of_folders(tmp_path, video, name):
    files, expected, levels = LEVELS[name]
    place(video, *(tmp_path / "set" / file for file in files))
    report = write_index(tmp_path / "set", tmp_path / "i.csv", IndexOptions())
    index = Index.load(tmp_path / "i.csv")
    assert sorted((v.label, v.split) for v in index) == expected and levels in report["levels"]
    assert len(set(index.source_ids.tolist())) == len(files)  # equal names do not make videos siblings
    assert not {"shared_source", "same_file"} & report["counts"].keys()


def test_folders_need_not_be_classes(tmp_path, video, capsys):
    place(video, *(tmp_path / "set" / name for name in ("train/2019/a.mp4", "train/2020/a.mp4", "test/2019/b.mp4",
                                                       "test/c.mp4")))  # fmt: skip
    assert main(["index", str(tmp_path / "set"), "--out", str(tmp_path / "i.csv"), "--no-classes"]) == 0
    said = capsys.readouterr().out
    assert "4 videos, no classes (pretraining needs none), 4 sources, test 2, train 2" in said
    assert "the first folder level is the split; no folder is taken as a class" in said and "no_class" not in said
    index = Index.load(tmp_path / "i.csv")
    assert {video.label for video in index} == {""} and len(set(index.source_ids.tolist())) == 4


@pytest.mark.parametrize("flat", [False, True])
def test_videos_without_classes_keep_the_flow_of_their_own_folder(tmp_path, video, flat):
    """By --no-classes, or because most videos lie in no folder: equal names in two folders stay two videos."""
    names = ["2019/a", "2020/a", "2020/b"]
    place(video, *(tmp_path / "set" / f"{name}.mp4" for name in names))
    place(video, *(tmp_path / "set" / f"{i}.mp4" for i in range(4 * flat)))
    picture = io.BytesIO()
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(picture, "JPEG")
    with RecordWriter(tmp_path / "flow.lmdb") as writer:
        for name in names:
            writer.put(name, [picture.getvalue()] * 19)
    write_index(tmp_path / "set", tmp_path / "i.csv", IndexOptions(flow_lmdb=tmp_path / "flow.lmdb", classes=flat))
    index = Index.load(tmp_path / "i.csv")
    assert {video.label for video in index} == {""}
    found = {str(v.path.relative_to(tmp_path / "set").with_suffix("")): split_record(v.flow_path)[1] for v in index
             if v.flow_path is not None}  # fmt: skip
    assert found == {name: name for name in names}


def test_clips_of_one_source_in_two_splits_are_named(tmp_path, video):
    place(video, tmp_path / "train/walk/x_c01.mp4", tmp_path / "train/run/x_c01.mp4", tmp_path / "test/walk/x_c02.mp4")
    report = write_index(tmp_path, tmp_path / "i.csv", IndexOptions())
    assert [p["reason"] for p in report["problems"]] == ["source 'walk/x' is also in split 'test'"]


def test_an_index_without_splits_is_used_whole_for_training_only(tmp_path, video, caplog):
    place(video, tmp_path / "a.mp4", tmp_path / "b.mp4")
    write_index(tmp_path, tmp_path / "i.csv", IndexOptions())
    index = Index.load(tmp_path / "i.csv")
    with caplog.at_level("INFO"):
        assert len(index.select_for_training("train")) == len(index.select_for_training("")) == 2
    assert "no splits" in caplog.text
    with pytest.raises(IndexFileError, match="no splits.*--protocol leave_source_out"):
        index.select("train")


def test_what_is_passed_over_is_named(tmp_path, video, capsys):
    root = tmp_path / "set"
    place(video, *(root / "c" / name for name in ("ok.mp4", "._ok.mp4", "UPPER.AVI", "plain", "x.video", "y.mp4.part")))
    place(video, root / "stray.mp4", root / ".git" / "x.mp4", root / "__MACOSX" / "c" / "x.mp4", root / "c/v.flow.mp4")
    (root / "c" / "notes.txt").write_text("no video")
    (root / "c" / "other.xyz").write_bytes(bytes(500))
    (root / "c" / "zero.mkv").touch()
    (root / "c" / "text.wmv").write_text("no video " * 100)
    (root / "empty" / "below").mkdir(parents=True)
    os.mkfifo(root / "c" / "pipe.mp4")
    (root / "c" / "gone.mp4").symlink_to("nowhere.mp4")
    (root / "c" / "loop").symlink_to(root)
    (root / "c" / "again.mp4").symlink_to("ok.mp4")
    assert main(["index", str(root), "--out", str(tmp_path / "i.csv")]) == 0
    said = capsys.readouterr().out
    index = Index.load(tmp_path / "i.csv")
    names = [(v.path.name, v.label) for v in index]
    assert names == [("UPPER.AVI", "c"), ("again.mp4", "c"), ("ok.mp4", "c"), ("plain", "c"), ("x.video", "c"),
                     ("stray.mp4", "")]  # fmt: skip
    for line in ("2 missing", "1 broken", "1 empty (", "1 unfinished", "3 hidden", "1 empty_folder", "1 link_loop",
                 "1 no_class", "1 same_file", "stray.mp4", "gone.mp4", "pipe.mp4", "text.wmv"):  # fmt: skip
        assert line in said, line
    assert "Other files, not read: 1 .flow.mp4, 1 .txt, 1 .xyz" in said
    assert "next: add videos to pretrain on, and run this command again" in said


def test_links_to_folders_are_followed(tmp_path, video):
    place(video, tmp_path / "store" / "v.mp4", tmp_path / "data" / "run" / "v.mp4")
    (tmp_path / "data" / "walk").symlink_to("../store")
    write_index(tmp_path / "data", tmp_path / "i.csv", IndexOptions())
    assert [v.label for v in Index.load(tmp_path / "i.csv")] == ["run", "walk"]


def test_links_in_a_circle_and_links_to_other_things_are_named(tmp_path, video):
    root = tmp_path / "set"
    place(video, root / "walk/a.mp4")
    for name, target in {"one.mp4": "two.mp4", "two.mp4": "one.mp4", "self": "self", "null.mp4": os.devnull}.items():
        os.symlink(target, root / "walk" / name)
    os.mkfifo(root / "walk/pipe.mp4")
    report = write_index(root, tmp_path / "i.csv", IndexOptions())
    found = {Path(p["path"]).name: p["reason"] for p in report["problems"] if p["kind"] == "missing"}
    circle = "is a symbolic link that cannot be followed: Too many levels of symbolic links"
    assert found == {"one.mp4": circle, "two.mp4": circle, "null.mp4": "is not a file", "pipe.mp4": "is not a file"}
    assert report["videos"] == 1


def test_folders_and_files_without_permission_are_named(tmp_path, video):
    place(video, tmp_path / "c/ok.mp4", tmp_path / "c/secret.mp4", tmp_path / "locked/v.mp4")
    with without_permission(tmp_path / "c/secret.mp4", tmp_path / "locked"):
        report = write_index(tmp_path, tmp_path / "i.csv", IndexOptions())
    assert report["counts"] == {"unreadable_folder": 1, "unreadable": 1}


def test_a_transcoded_copy_below_the_root_is_not_listed_again(tmp_path, video):
    place(video, tmp_path / "c/a.mp4", tmp_path / "c/a.avi")
    for _ in range(2):
        report = write_index(tmp_path, tmp_path / "i.csv", IndexOptions(transcode=tmp_path / "new", short_side=32))
        assert report["videos"] == 2 and {v.height for v in Index.load(tmp_path / "i.csv")} == {32}
