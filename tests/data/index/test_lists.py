"""Split lists as people write, join, convert and truncate them: each is read as meant, or the error names its line."""

import re
from unittest.mock import Mock

import pytest
from support.videos.odd_videos import write_plain

from cpr_fast.cli import main
from cpr_fast.data.index.build import IndexOptions, write_index
from cpr_fast.data.index.index import COLUMNS, Index, IndexFileError
from cpr_fast.errors import InputError

HEAD = "label,youtube_id,time_start,time_end,split\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lists") / "set"
    for name in ("A/v_A_g01_c01", "A/v_A_g02_c01", "B/v B g01_c01", "B/ü100%", "b0_000084_000094", "B C/x", "walk/w"):
        write_plain(folder / f"{name}.mp4", 18)
    return folder


def listed(root, tmp_path, layout, files):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    report = write_index(root, tmp_path / "i.csv", IndexOptions(layout, tmp_path))
    return {video.path.stem: video.split for video in Index.load(tmp_path / "i.csv")}, report


def ucf101(train, test="A/v_A_g02_c01.avi\n", classes="1 A\n2 B\n3 B C\n"):
    return {"classInd.txt": classes, "trainlist01.txt": train, "testlist01.txt": test}


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("/data/UCF 101/A/v_A_g01_c01.avi 1", "v_A_g01_c01"),
        ("./A/v_A_g01_c01.avi", "v_A_g01_c01"),
        (r"A\v_A_g01_c01.avi 1", "v_A_g01_c01"),
        ('"A/v_A_g01_c01.avi" 1', "v_A_g01_c01"),
        ("A/V_a_G01_C01.AVI\t1", "v_A_g01_c01"),
        ("B/v B g01_c01.avi 2", "v B g01_c01"),
        ('"B/v B g01_c01.avi" 2', "v B g01_c01"),
        ("B/ü100%.avi 2", "ü100%"),
        ("B/u\u0308100%.avi 2", "ü100%"),  # as macOS decomposes it
        ("B C/x.avi 3", "x"),
    ],
)
def test_names_in_every_spelling(root, tmp_path, line, name):
    splits, report = listed(root, tmp_path, "ucf101", ucf101(line + "\n"))
    assert splits == {name: "train", "v_A_g02_c01": "test"} and report["counts"].keys() <= {"empty_folder"}


def test_clips_of_one_source_stay_together_whatever_the_case_of_their_rows(root, tmp_path):
    write_plain(tmp_path / "set/A/v_A_g01_c01.mp4", 18)
    write_plain(tmp_path / "set/A/v_A_g01_c02.mp4", 18)
    rows = "A/V_A_G01_c01.avi 1\nA/v_A_g01_c02.avi 1\n"
    listed(tmp_path / "set", tmp_path, "ucf101", ucf101(rows, "A/v_A_g01_c02.avi\n"))
    assert {video.source for video in Index.load(tmp_path / "i.csv")} == {"v_A_g01"}


@pytest.mark.parametrize(
    ("layout", "files", "message"),
    [
        ("ucf101", ucf101("v_A_g01_c01.avi 1\n"), r"trainlist01.txt:1: expected <class>/<video> .*got 'v_A_g01_c"),
        ("ucf101", ucf101("A/v.avi 1\na/v.avi 1\n"), r"trainlist01.txt:2: class 'a' .* did you mean 'A'\? The c"),
        ("ucf101", ucf101("# my list\n"), r"trainlist01.txt:1: expected <class>/<video> .*got '# my list'"),
        ("ucf101", ucf101(b"A/caf\xe9.avi 1\n"), r"trainlist01.txt:1: expected UTF-8, got b'A/caf\\xe9.avi 1'"),
        ("ucf101", ucf101("A/v\0.avi 1\n"), "trainlist01.txt: expected a UTF-8 split list, got a binary file"),
        ("ucf101", ucf101("", ""), r"--splits: the lists in .* name no video \(trainlist01.txt, testlist01.txt\)"),
        ("ucf101", ucf101("A/v.avi 1\n", classes="1 A\n2 B\n3 A\n"), r"classInd.txt:3: class 'A' repeats .*:1"),
        ("ucf101", ucf101("A/v.avi 1\n", classes="1 A\n2 B\n2 C\n"), "txt:3: number 2 of class 'C' repeats .*:2"),
        ("hmdb51", {"Walk_test_split1.txt": "w.avi 1\n"}, "class 'Walk' .* did you mean 'walk'"),
        ("hmdb51", {"walk_test_split1.txt": "w.avi 0\n"}, r"--splits: the lists .* name no video \(walk_"),
        ("coclr", {"train_split01.csv": ""}, r"--splits: the lists in .* name no video \(train_split01.csv\)"),
        ("coclr", {"train_split01.csv": "/A/v/,5\n", "ClassInd.txt": "A\nA\n"}, "ClassInd.txt:2: class 'A' repeats"),
        ("kinetics", {"train.csv": HEAD}, r"--splits: the lists in .* name no video \(train.csv\)"),
        ("kinetics", {"train.csv": ""}, "train.csv:1: missing column .*, got an empty file"),
        ("kinetics", {"train.csv": f"label,{HEAD}"}, "expected every column once, got 'label' more than once"),
        ("kinetics", {"train.csv": f"{HEAD}yoga, hot,b0,84,94,train\n"}, "train.csv:2: expected 5 fields, got 6"),
        ("kinetics", {"train.csv": f"{HEAD}A,b0,inf,94,train\n"}, "column time_start: expected seconds, got 'inf'"),
        ("kinetics", {"train.csv": f"{HEAD}A,b0,84,-1,train\n"}, "column time_end: expected seconds, got '-1'"),
        ("kinetics", {"train.csv": f"{HEAD}A,,84,94,train\n"}, "column youtube_id: expected the id of a video, got ''"),
        ("kinetics", {"train.csv": f"{HEAD}caf\xe9,b0,84,94,train\n".encode("latin-1")}, "train.csv:2: expected UTF-8"),
    ],
)  # fmt: skip
def test_a_list_that_cannot_be_meant_is_named(root, tmp_path, layout, files, message):
    with pytest.raises(InputError, match=message):
        listed(root, tmp_path, layout, files)
    assert not (tmp_path / "i.csv").exists()


@pytest.mark.parametrize("split", ["train", "Train", "TRAIN", " train ", "training"])
def test_names_of_splits_are_read_in_any_case(root, tmp_path, split):
    files = {"k.csv": f"{HEAD} A ,b0,84.0,94,{split}\n"}
    splits, report = listed(root, tmp_path, "kinetics", files)
    assert splits == {"b0_000084_000094": "train"} and Index.load(tmp_path / "i.csv")[0].label == "A"
    assert (f"{split!r} is 'train'" in report["levels"]) == (split.strip() != "train")


def test_a_split_that_was_edited_by_hand_is_found_in_any_case(root, tmp_path):
    rows = "".join(f"{root}/{name}.mp4,A,{name},{split},18,25,64,48,\n" for name, split in
                   (("A/v_A_g01_c01", "Train"), ("A/v_A_g02_c01", "train"), ("walk/w", "Mine")))  # fmt: skip
    (tmp_path / "i.csv").write_text(f"{','.join(COLUMNS)}\n{rows}")
    index = Index.load(tmp_path / "i.csv")
    assert len(index.select("train")) == len(index.select("TRAIN")) == 2 and len(index.select("Mine")) == 1
    with pytest.raises(IndexFileError, match="split 'mine': .* its splits are 'train', 'Mine'"):
        index.select("mine")


TWO = "A/v_A_g01_c01.avi {}\nB/v B g01_c01.avi {}\n"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (ucf101(TWO.format(1, 2)), None),
        (ucf101(TWO.format(0, 1)), None),  # the list counts from 0
        (ucf101(TWO.format(1, 2), classes="A\nB\nB C\n"), None),  # the classes have no numbers
        (ucf101(TWO.format(1, 3)), "'B' (trainlist01.txt:2): its number 3 there is that of 'B C'"),
        (ucf101(TWO.format(7, 2)), "'A' (trainlist01.txt:1): its number 7 there is that of no class"),
        (ucf101(TWO.format(1, 2) + "B/v_A_g03_c01.avi 2\n"), "'B' (trainlist01.txt:3): its name says 'A'"),
    ],
)  # fmt: skip
def test_numbers_and_names_that_contradict_the_class_of_a_list_are_reported(root, tmp_path, files, reason):
    for name in ("A/v_A_g01_c01", "B/v B g01_c01", "A/v_A_g02_c01", "B/v_A_g03_c01"):
        write_plain(tmp_path / "set" / f"{name}.mp4", 18)
    _, report = listed(tmp_path / "set", tmp_path, "ucf101", files)
    found = [problem["reason"] for problem in report["problems"] if problem["kind"] == "other_class"]
    kept = ", which the index says, but "
    assert [text.replace(kept, ": ") for text in found] == [f"is listed in class {reason}"] * (reason is not None)
    assert {video.path.stem: video.label for video in Index.load(tmp_path / "i.csv")}["v B g01_c01"] == "B"


def test_the_film_of_a_clip_of_hmdb51_is_not_its_class(tmp_path):
    """A film may be called as a class; a clip of a class whose name ends in another class is not contradictory."""
    names = {"sword": "x_draw_sword_f_cm_np1_ba_med_0", "draw_sword": "y_draw_sword_f_cm_np1_ba_med_0",
             "sit": "z_wave_f_cm_np1_ba_med_0"}  # fmt: skip
    for label, name in names.items():
        write_plain(tmp_path / "set" / label / f"{name}.mp4", 18)
    lists = {f"{label}_test_split1.txt": f"{name}.avi 1\n" for label, name in names.items()}
    _, report = listed(tmp_path / "set", tmp_path, "hmdb51", lists)
    assert [problem["reason"] for problem in report["problems"]] == [
        "is listed in class 'sit' (sit_test_split1.txt:1), which the index says, but its name says 'wave'"
    ]


def test_an_empty_list_and_classes_spelled_almost_alike_are_reported(root, tmp_path, capsys):
    for name, content in ucf101("A/v_A_g01_c01.avi 1\n", "").items():
        (tmp_path / name).write_text(content)
    assert (
        main(["index", str(root), "--layout", "ucf101", "--splits", str(tmp_path), "--out", f"{tmp_path}/i.csv"]) == 0
    )
    assert "1 empty_list (split list that names no video)" in capsys.readouterr().out
    for name in ("yoga/a", "Yoga/b", "Yoga/c"):
        write_plain(tmp_path / "two" / f"{name}.mp4", 18)
    assert main(["index", str(tmp_path / "two"), "--out", str(tmp_path / "j.csv")]) == 0
    assert "class 'yoga' of 1 video is spelled almost like 'Yoga'; they are two classes" in capsys.readouterr().out


def test_names_of_records_that_are_not_utf8_are_named(tmp_path, capsys):
    import lmdb
    import msgpack

    with lmdb.open(str(tmp_path / "x.lmdb"), subdir=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"__order__", msgpack.packb([b"A/caf\xe9"]))
    assert main(["index", str(tmp_path / "x.lmdb"), "--layout", "lmdb", "--out", str(tmp_path / "i.csv")]) == 2
    assert "expected UTF-8 names in the key '__order__'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layout", "splits", "said"),
    [
        ("ucf101", None, "--splits: layout 'ucf101' needs the folder of classInd.txt"),
        ("coclr", None, "--splits: layout 'coclr' needs the folder of CoCLR's"),
        ("kinetics", "nowhere", "--splits: expected the folder of the split lists, got '"),
        ("folders", ".", "--splits: layout 'folders' reads the split from the folders, got '"),
    ],
)
def test_lists_that_do_not_fit_the_layout_are_refused_before_videos_are_looked_for(
    root, tmp_path, monkeypatch, layout, splits, said
):
    """On a large disk looking for them takes minutes."""
    monkeypatch.setattr("cpr_fast.data.index.layouts.Catalogue", Mock(side_effect=AssertionError))
    with pytest.raises(InputError, match=re.escape(said)):
        write_index(root, tmp_path / "i.csv", IndexOptions(layout, splits and tmp_path / splits))
