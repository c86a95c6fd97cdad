"""Contradictory lists, a failing disk and an index that is written again: every loss of data is reported."""

import json
from pathlib import Path

import pytest
from support.videos.odd_videos import damage, place, write_plain, write_size_change, write_streams
from support.videos.odd_videos import pictures as frames_of

import cpr_fast.data.index.build as build
from cpr_fast.cli import main
from cpr_fast.data.index.build import IndexOptions, report_path, write_index
from cpr_fast.data.index.index import Index
from cpr_fast.data.index.probing import _with_estimate
from cpr_fast.data.index.summary import COPIES, KINDS, summary
from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.probe import probe_video
from cpr_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[3]


def lists(folder: Path, train: str, test: str = "", classes: str = "1 A\n2 B\n") -> IndexOptions:
    folder.mkdir(exist_ok=True)
    for name, text in (("classInd.txt", classes), ("trainlist01.txt", train), ("testlist01.txt", test)):
        (folder / name).write_text(text)
    return IndexOptions("ucf101", folder)


def rows(csv_path: Path) -> dict[str, tuple[str, str]]:
    return {str(v.path.relative_to(csv_path.parent)): (v.label, v.split) for v in Index.load(csv_path)}


class TestNames:
    """Videos are found by class and name."""

    @pytest.fixture
    def root(self, tmp_path):
        write_plain(tmp_path / "set/A/v.mp4", 20)
        write_plain(tmp_path / "set/B/v.mp4", 5, height=80, width=96)
        return tmp_path / "set"

    @pytest.mark.parametrize("train", ["A/v.avi 1\nB/v.avi 2\n", "B/v.avi 2\n"])
    def test_equal_names_in_two_classes(self, root, tmp_path, train):
        write_index(root, tmp_path / "i.csv", lists(tmp_path / "l", train))
        index = Index.load(tmp_path / "i.csv")
        assert {v.label: (v.path.parent.name, v.width) for v in index}["B"] == ("B", 96)
        assert len({v.source for v in index}) == len(index)

    def test_a_video_in_the_folder_of_another_class_is_not_taken(self, root, tmp_path):
        (root / "B/v.mp4").unlink()
        report = write_index(root, tmp_path / "i.csv", lists(tmp_path / "l", "A/v.avi 1\nB/v.avi 2\n"))
        assert rows(tmp_path / "i.csv") == {"set/A/v.mp4": ("A", "train")}
        assert report["counts"] == {"missing": 1, "empty_folder": 1, "empty_list": 1}

    def test_two_files_of_one_name_and_class(self, root, tmp_path):
        for name in ("v.avi", "x/v.mkv"):
            write_plain(root / "A" / name, 5)
        report = write_index(root, tmp_path / "i.csv", lists(tmp_path / "l", "A/v.avi 1\n"))
        assert rows(tmp_path / "i.csv").keys() == {"set/A/v.avi"}
        problem = next(problem for problem in report["problems"] if problem["kind"] == "ambiguous")
        assert "A/v.mp4" in problem["reason"]

    def test_flow_records_are_found_by_class_and_name(self, root, tmp_path):
        from cpr_fast.data.storage.record_writer import RecordWriter

        with RecordWriter(tmp_path / "flow.lmdb") as writer:
            for name in ("A/v", "B/v"):
                writer.put(name, [b"jpeg"] * 4)
        options = IndexOptions(flow_lmdb=tmp_path / "flow.lmdb", verify=False)
        videos = build.list_videos("folders", root, None, 1, class_order="official", flow_lmdb=options.flow_lmdb).videos
        assert [str(item.flow_path) for item in videos] == [f"{tmp_path}/flow.lmdb#{name}" for name in ("A/v", "B/v")]


@pytest.mark.parametrize(
    ("train", "test", "expected", "counts"),
    [
        ("A/v.avi 1\nA/w.avi 1\n", "A/v.avi\n", {"set/v.mp4": ("A", "test"), "set/w.mp4": ("A", "train")},
         {"two_splits": 1}),
        ("A/v.avi 1\nB/v.avi 2\nA/w.avi 1\n", "", {"set/w.mp4": ("A", "train")}, {"two_classes": 1}),
        ("A/v.avi 1\nA/v.avi 1\n", "", {"set/v.mp4": ("A", "train")}, {"repeated": 1}),
        ("A/v.avi 1\nA/gone.avi 1\n", "", {"set/v.mp4": ("A", "train")}, {"missing": 1}),
        ("A/s_c01.avi 1\n", "A/s_c02.avi\n", {"set/s_c01.mp4": ("A", "train"), "set/s_c02.mp4": ("A", "test")},
         {"shared_source": 1}),
    ],
)  # fmt: skip
def test_contradictory_lists(tmp_path, train, test, expected, counts):
    for name in ("v", "w", "s_c01", "s_c02"):
        write_plain(tmp_path / "set" / f"{name}.mp4", 20)
    report = write_index(tmp_path / "set", tmp_path / "i.csv", lists(tmp_path / "l", train, test))
    counts = counts if test else counts | {"empty_list": 1}
    assert rows(tmp_path / "i.csv") == expected and report["counts"] == counts
    assert counts.keys() <= KINDS.keys()


def test_what_only_decoding_shows(tmp_path, capsys):
    root = tmp_path / "set/c"
    write_plain(root / "fine.mp4")
    for block in range(1, 16):  # until the damage makes the decoder report an error
        if probe_video(damage(write_plain(root / "bad.mp4", height=96, width=128), block)).corrupt:
            break
    write_size_change(root / "joined.ts")
    write_streams(root / "two.mkv", frames_of(20), frames_of(20, 80, 96))
    assert main(["index", str(tmp_path / "set"), "--out", str(tmp_path / "i.csv"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    kinds = {Path(problem["path"]).name: problem["kind"] for problem in report["problems"]}
    assert kinds == {"bad.mp4": "damaged", "joined.ts": "size_change", "two.mkv": "several_streams"}
    assert {v.path.name: v.num_frames for v in Index.load(tmp_path / "i.csv")} == dict.fromkeys(
        ["bad.mp4", "fine.mp4", "joined.ts", "two.mkv"], 20
    )
    text = "\n".join(summary(report))
    assert "1 size_change" in text and "from 64x48 yuv420p to 96x80 yuv420p" in text


class TestLostDisk:
    @pytest.fixture
    def root(self, tmp_path):
        for number in range(24):
            write_plain(tmp_path / f"set/c/v{number:02d}.mp4", 3)
        return tmp_path / "set"

    def test_no_index_of_half_the_videos(self, tmp_path, root, monkeypatch, capsys):
        real = build.probe

        def failing(path, **options):
            if path.name >= "v08.mp4":
                raise VideoError(path, "Input/output error", unreadable=True)
            return real(path, **options)

        monkeypatch.setattr(build, "probe", failing)
        assert main(["index", str(root), "--out", str(tmp_path / "i.csv")]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "16 of 24 videos could not be read (16 'Input/output error'" in error and "still mounted?" in error
        assert not (tmp_path / "i.csv").exists()
        monkeypatch.setattr(build, "probe", real)
        report = write_index(root, tmp_path / "i.csv", IndexOptions())
        assert (report["videos"], report["probed"], report["counts"]) == (24, 16, {"short": 24})

    def test_a_few_are_left_out_in_one_line(self, tmp_path, root, monkeypatch):
        real = build.probe

        def failing(path, **options):
            if path.name < "v05.mp4":
                raise VideoError(path, "Input/output error", unreadable=True)
            return real(path, **options)

        monkeypatch.setattr(build, "probe", failing)
        report = write_index(root, tmp_path / "i.csv", IndexOptions())
        lines = [line for line in summary(report) if "unreadable" in line]
        assert report["videos"] == 19 and len(lines) == 1
        assert lines[0].startswith("  5 unreadable (could not be read): ") and lines[0].endswith("; and 2 more")


def test_long_work_is_estimated_once(monkeypatch, caplog):
    now = [0]
    monkeypatch.setattr("cpr_fast.data.index.probing.time.monotonic", lambda: now[0])

    def videos(count):
        for number in range(count):
            now[0] += 3
            yield number

    with caplog.at_level("INFO"):
        assert list(_with_estimate(videos(100), 100, "decoding", 2)) == list(range(100))
        assert list(_with_estimate(videos(4), 4, "decoding", 2)) == list(range(4))  # too short for an estimate
    (line,) = caplog.messages
    assert line.startswith("decoding 100 videos: about 4 min 50 s left, at 0.3 videos/s") and "--shard 0/4" in line


class TestAgain:
    @pytest.fixture
    def index(self, tmp_path):
        for name in ("a", "b"):
            write_plain(tmp_path / f"set/c/{name}.mp4", 20)
            write_plain(tmp_path / f"flow/{name}.flow.mp4", 19)
        write_index(tmp_path / "set", tmp_path / "i.csv", IndexOptions())
        text = (tmp_path / "i.csv").read_text()
        for name in ("a", "b"):
            text = text.replace(f"{name}.mp4,c,c/{name}.mp4,,20,25,64,48,\n",
                                f"{name}.mp4,c,c/{name}.mp4,,20,25,64,48,flow/{name}.flow.mp4\n")  # fmt: skip
        (tmp_path / "i.csv").write_text(text)
        return tmp_path / "i.csv"

    def test_flow_is_kept_where_it_fits(self, tmp_path, index):
        write_plain(tmp_path / "set/c/b.mp4", 25)
        report = write_index(tmp_path / "set", index, IndexOptions())
        flow = {v.path.stem: v.flow_path for v in Index.load(index)}
        assert flow == {"a": tmp_path / "flow/a.flow.mp4", "b": None}
        assert [p["kind"] for p in report["problems"]] == ["flow_dropped"]
        assert "had flow of 20 frames of 64x48, and now is 25 frames" in report["problems"][0]["reason"]

    def test_columns_edited_by_hand_are_not_lost(self, tmp_path, index):
        edited = index.read_text().replace(",c,c/a.mp4,,", ",jump,c/a.mp4,train,")
        index.write_text(edited)
        report = write_index(tmp_path / "set", index, IndexOptions())
        assert (tmp_path / "i.old.csv").read_text() == edited
        assert report["counts"] == {"replaced": 1} and "label was 'jump', is 'c'" in report["problems"][0]["reason"]
        assert json.loads(report_path(index).read_text()) == report

    def test_an_unreadable_previous_index_does_not_stop_it(self, tmp_path, index):
        index.write_bytes(b"\xff\xfe\0no index")
        assert write_index(tmp_path / "set", index, IndexOptions())["videos"] == 2


def test_out_that_is_a_folder(tmp_path):
    write_plain(tmp_path / "c/v.mp4", 5)
    with pytest.raises(InputError, match="--out: expected the name of a CSV file, got the folder"):
        write_index(tmp_path, tmp_path / "c", IndexOptions())


def test_pictures_alone_are_named(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "1.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(
        InputError,
        match=r"ROOT: found no video.*; left out: 1 empty_folder .*: 1 \.jpg \(--layout rawframes reads",
    ):
        write_index(tmp_path, tmp_path / "i.csv", IndexOptions())


@pytest.mark.parametrize(
    ("classes", "said"), [(0, "no classes (pretraining needs none)"), (1, "1 class"), (3, "3 classes")]
)
def test_the_summary_of_unlabelled_videos_says_that_no_labels_are_needed(classes, said):
    report = {"index": "i.csv", "videos": 8, "classes": classes, "sources": 8, "splits": {"": 8}, "levels": "",
              "unlabelled": 0, "problems": [], "other_files": {}, "without_flow": 8,
              "training": {"split": "", "videos": 8, "sources": 8}}  # fmt: skip
    assert summary(report)[0] == f"i.csv: 8 videos, {said}, 8 sources, no splits"
    report["splits"] = {"": 2, "train": 6}
    assert summary(report)[0].endswith("8 sources, train 6, 2 videos without a split")


@pytest.mark.parametrize(
    ("videos", "said"),
    [
        (["a.mp4", "b.mp4"], "got 2 videos of 2 sources."),
        ([f"x_c{n:02d}.mp4" for n in range(9)], "got 9 videos of 1 source."),
        (["train/a/a.mp4", *(f"test/a/{n}.mp4" for n in range(9))], "got 1 video of 1 source in split 'train'."),
        ([f"{n}.mp4" for n in range(8)], None),
    ],
)
def test_an_index_of_too_few_videos_says_so_at_once(tmp_path, capsys, videos, said):
    place(write_plain(tmp_path / "v.mp4", 3), *(tmp_path / "set" / name for name in videos))
    assert main(["index", str(tmp_path / "set"), "--out", str(tmp_path / "i.csv")]) == 0
    printed = capsys.readouterr().out
    few = f"Too few videos for pretraining: expected at least 8 training videos of at least 2 sources, {said}\n"
    assert (few in printed) == (said is not None)
    assert ("next: add videos to pretrain on" in printed) == (said is not None)
    refused = main(["init", str(tmp_path / "i.csv"), "--out", str(tmp_path / "r.toml"), "--seconds", "0"])
    assert refused == (0 if said is None else 2)
    reason = f"expected at least 8 training videos of at least 2 sources, {said}".rstrip(".")
    assert (reason in capsys.readouterr().err) == (said is not None)


def test_an_index_that_is_replaced_is_kept_if_it_lists_other_videos(tmp_path, capsys):
    video, out = write_plain(tmp_path / "v.mp4", 18), tmp_path / "i.csv"
    place(video, *(tmp_path / "a" / f"{n}.mp4" for n in range(8)), *(tmp_path / "b" / f"{n}.mp4" for n in range(9)))
    assert main(["index", str(tmp_path / "a"), "--out", str(out)]) == 0
    assert main(["index", str(tmp_path / "a"), "--out", str(out)]) == 0  # the same videos
    assert not (tmp_path / "i.old.csv").exists() and "not_listed" not in capsys.readouterr().out
    (tmp_path / "a/3.mp4").unlink()  # deleted by the user, who knows it
    assert main(["index", str(tmp_path / "a"), "--out", str(out)]) == 0
    assert not (tmp_path / "i.old.csv").exists() and "not_listed" not in capsys.readouterr().out
    before = out.read_text()
    assert main(["index", str(tmp_path / "b"), "--out", str(out)]) == 0
    said = f"7 not_listed (only in the previous index): {tmp_path}/a/0.mp4: the previous index is i.old.csv; "
    printed = capsys.readouterr().out
    assert said in printed and "; and 4 more\n" in printed and (tmp_path / "i.old.csv").read_text() == before
    (tmp_path / "b/1.mp4").write_bytes(b"broken")  # its own problem says why it is not listed
    assert main(["index", str(tmp_path / "b"), "--out", str(out)]) == 0
    assert "not_listed" not in capsys.readouterr().out


def test_copies_are_named_with_what_contradicts(tmp_path, capsys):
    video, root = write_plain(tmp_path / "v.mp4", 18), tmp_path / "set"
    place(video, root / "train/A/one.mp4")
    content = (root / "train/A/one.mp4").read_bytes()
    for name in ("train/A/two.mp4", "train/B/three.mp4", "test/A/four.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "train/B/shifted.mp4").write_bytes(content[:-1] + b"!")  # of equal size, but another content
    assert main(["index", str(root), "--out", str(tmp_path / "i.csv")]) == 0
    printed = capsys.readouterr().out
    assert "3 same_content (copy of another file, byte by byte)" in printed
    assert printed.count(COPIES) == 1 and COPIES in " ".join((ROOT / "docs" / "data.md").read_text().split())
    problems = json.loads(report_path(tmp_path / "i.csv").read_text())["problems"]
    found = {Path(p["path"]).stem: p["reason"].split(", which ") for p in problems if p["kind"] == "same_content"}
    first = root / "test/A/four.mp4"
    assert {reason[0] for reason in found.values()} == {f"holds the same bytes as {first}"}
    assert {name: reason[1:] for name, reason in found.items()} == {
        "one": ["has split 'test'"], "two": ["has split 'test'"], "three": ["has label 'A' and split 'test'"]
    }  # fmt: skip
    assert len(Index.load(tmp_path / "i.csv")) == 5
