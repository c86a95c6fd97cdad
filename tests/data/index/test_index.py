"""The index file, and how it is built from a listing of a data set."""

import os
import shutil
from pathlib import Path

import av
import numpy as np
import pytest

from cpr_fast.config import DataConfig
from cpr_fast.data.index.build import build_index
from cpr_fast.data.index.index import COLUMNS, Index, IndexFileError, Video
from cpr_fast.errors import InputError

HEADER = ",".join(COLUMNS)


def write_video(path: Path, frames: int = 5, codec: str = "mpeg4", width: int = 48, height: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            image = np.full((height, width, 3), 20 * i % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_index(folder: Path, *rows: str, header: str = HEADER) -> Path:
    for name in ("a.mp4", "b.mp4"):
        (folder / name).touch()
    path = folder / "index.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


# ---- reading and writing


def test_saved_index_reads_back_the_same(tmp_path):
    for name in ("x/ä b.mp4", "x/c,d.mp4", "flow/f.mp4", "e.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    videos = [
        Video(tmp_path / "x/ä b.mp4", "Jump", "s1", "train", 48, 25.0, 160, 120, tmp_path / "flow/f.mp4"),
        Video(tmp_path / "x/c,d.mp4", "Archery", "s1", "train", 7, 30000 / 1001, 161, 121, None),
        Video(tmp_path / "e.mp4", "", "s2", "test", 1, 5.0, 2, 2, None),
    ]
    csv_path = tmp_path / "lists" / "index.csv"
    Index(videos).save(csv_path)
    loaded = Index.load(csv_path)
    for video, read in zip(videos, loaded, strict=True):
        assert os.path.samefile(read.path, video.path)
        assert (read.flow_path is None) == (video.flow_path is None)
        assert (read.label, read.source, read.split) == (video.label, video.source, video.split)
        assert (read.num_frames, read.width, read.height) == (video.num_frames, video.width, video.height)
        assert read.fps == pytest.approx(video.fps, rel=1e-5)
    assert loaded.classes == ["Jump", "Archery"]  # in the order of first appearance, not alphabetical
    assert loaded.labels.tolist() == [0, 1, -1] and loaded.labels.dtype == np.int64
    assert loaded.source_ids.tolist() == [0, 0, 1] and loaded.source_ids.dtype == np.int64
    assert [path.name for path in csv_path.parent.iterdir()] == ["index.csv"]  # no temporary file is left


def test_index_and_videos_move_together(tmp_path):
    write_video(tmp_path / "old" / "Jump" / "v.mp4")
    build_index(tmp_path / "old", out=tmp_path / "old" / "index.csv")
    os.rename(tmp_path / "old", tmp_path / "new")
    assert Index.load(tmp_path / "new" / "index.csv")[0].path.is_file()


def test_selection_is_numbered_anew_and_keeps_the_labels():
    row = {"num_frames": 1, "fps": 1.0, "width": 2, "height": 2}
    names = [("A", "s0", "train"), ("B", "s1", "test"), ("C", "s2", "test"), ("B", "s1", "test")]
    index = Index(Video(Path(f"{i}"), *name, **row) for i, name in enumerate(names))
    test = index.select("test")
    assert [str(video.path) for video in test] == ["1", "2", "3"]
    assert test.labels.tolist() == [1, 2, 1] and test.classes == ["A", "B", "C"]
    assert test.source_ids.tolist() == [0, 1, 0]
    with pytest.raises(IndexFileError, match="'val'.*'train', 'test'"):
        index.select("val")


def test_columns_may_come_in_any_order(tmp_path):
    path = write_index(tmp_path, "2,3,a.mp4,Jump,s,train,9,,10", header="width,height,path,label,source,split,"
                       "num_frames,flow_path,fps")  # fmt: skip
    video = Index.load(path)[0]
    assert (video.width, video.height, video.num_frames, video.fps, video.label) == (2, 3, 9, 10.0, "Jump")


def test_a_video_without_source_is_a_source_of_its_own(tmp_path):
    index = Index.load(write_index(tmp_path, "a.mp4,J,,train,9,10,2,2,", "b.mp4,J,,train,9,10,2,2,"))
    assert index.source_ids.tolist() == [0, 1]


# ---- bad input: errors give file, line, column, the value and what was expected


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("path,label,source,split,fps,width,height", ["a.mp4,J,s,train,10,2,2"],
         r"index.csv:1: missing column 'num_frames', 'flow_path'; expected the header path,label"),
        ("", [], r"index.csv: expected an index .*whose first line is path,label"),
        (HEADER + ",rating", ["a.mp4,J,s,train,9,10,2,2,,5"], r"index.csv:1: .*'rating'"),
        (HEADER + ",path", ["a.mp4,J,s,train,9,10,2,2,,b.mp4"], r"index.csv:1: .*repeated"),
        (HEADER, [], r"index.csv: expected at least one video"),
        (HEADER, ["a.mp4,J,s,train,9,10,2,2,", "b.mp4,J,s,train,9,10,2"], r"index.csv:3: expected 9 fields, got 7"),
        (HEADER, ["a.mp4,J,s,train,nine,10,2,2,"],
         r"index.csv:2, column num_frames: expected a positive whole number below 2,147,483,648, got 'nine'"),
        (HEADER, ["a.mp4,J,s,train,0,10,2,2,"], r"column num_frames: .* got '0'"),
        (HEADER, ["a.mp4,J,s,train,9.5,10,2,2,"], r"column num_frames: .* got '9.5'"),
        (HEADER, ["a.mp4,J,s,train,9,,2,2,"], r"column fps: expected a positive number, got ''"),
        (HEADER, ["a.mp4,J,s,train,9,nan,2,2,"], r"column fps: .* got 'nan'"),
        (HEADER, ["a.mp4,J,s,train,9,inf,2,2,"], r"column fps: .* got 'inf'"),
        (HEADER, ["a.mp4,J,s,train,9,10,2,-2,"], r"column height: .* got '-2'"),
        (HEADER, ["a.mp4,J,s,train,9,10,2,2,", "", "gone.mp4,J,s,train,9,10,2,2,"],
         r"index.csv:4, column path: file '.*gone.mp4' does not exist"),
        (HEADER, ["a.mp4,J,s,train,9,10,2,2,no/flow.mp4"],
         r"index.csv:2, column flow_path: file '.*no/flow.mp4' does not exist"),
        (HEADER, ["a.mp4,J,s,train,9,10,2,2,", "a.mp4,J,s,train,9,10,2,2,"],
         r"index.csv:3, column path: 'a.mp4' repeats line 2"),
    ],
)  # fmt: skip
def test_a_bad_index_is_named(header, rows, message, tmp_path):
    with pytest.raises(IndexFileError, match=message):
        Index.load(write_index(tmp_path, *rows, header=header))


@pytest.mark.parametrize("name", ["./a.mp4", "sub/../a.mp4", "{folder}/a.mp4", "{folder}/sub/.././a.mp4"])
def test_a_video_that_is_named_in_two_ways_is_repeated(name, tmp_path):
    (tmp_path / "sub").mkdir()
    rows = [f"{path},J,s,train,9,10,2,2," for path in ("a.mp4", "b.mp4", name.format(folder=tmp_path))]
    with pytest.raises(IndexFileError, match=r"index.csv:4, column path: '.*a.mp4' repeats line 2"):
        Index.load(write_index(tmp_path, *rows))


def test_no_index_and_no_text_are_named(tmp_path):
    with pytest.raises(IndexFileError, match=r"gone.csv' does not exist"):
        Index.load(tmp_path / "gone.csv")
    with pytest.raises(IndexFileError, match="expected an index, but .* is a folder"):
        Index.load(tmp_path)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00path")
    with pytest.raises(IndexFileError, match="binary.csv: expected a UTF-8 index"):
        Index.load(tmp_path / "binary.csv")


def test_an_index_that_was_cut_off_anywhere_is_not_read_as_complete(tmp_path):
    """Where the cut leaves a complete last row, or only the last line break is missing, it cannot be seen."""
    for name in ("f/a.flow.mp4", "f/b.flow.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    row = "{0}.mp4,A,s{0},train,20,25,64,48,f/{0}.flow.mp4"
    path = write_index(tmp_path, row.format("a"), row.format("b"))
    whole = path.read_bytes()
    rows = whole.index(b"b.mp4")
    complete = {rows, rows - 1, len(whole) - 1, whole.rindex(b",") + 1}
    for end in range(whole.index(b"a.mp4") + 1, len(whole)):
        path.write_bytes(whole[:end])
        if end in complete or end == rows - 1 - len("f/a.flow.mp4"):
            assert len(Index.load(path, require_flow=False)) == 1 + (end > rows)
        else:
            with pytest.raises(IndexFileError, match=r"index.csv:[123]"):
                Index.load(path, require_flow=False)
    path.write_bytes(whole.replace(b"f/b", b"f/missing"))  # with its line break: the flow was removed
    assert [video.flow_path is None for video in Index.load(path, require_flow=False)] == [False, True]


def test_a_failed_write_leaves_the_old_index(tmp_path, monkeypatch):
    path = write_index(tmp_path, "a.mp4,J,s,train,9,10,2,2,")
    before = path.read_bytes()
    index = Index.load(path)

    def full_disk(self, *args, **kwargs):
        with open(self, "w") as file:
            file.write("path,lab")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(
        InputError, match="could not write '.*index.csv': No space left on device; the previous file is"
    ):
        index.save(path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "index.csv"]


# ---- folders


def test_folders_with_splits_siblings_and_broken_files(tmp_path):
    root = tmp_path / "set"
    write_video(root / "train" / "Jump" / "one_c01.mp4", frames=5)
    write_video(root / "train" / "Jump" / "one_c02.avi", frames=6)
    write_video(root / "train" / "Archery" / "one_c01.mkv", frames=7, codec="libx264")
    write_video(root / "test" / "Jump" / "two.mp4", frames=8)
    (root / "test" / "Jump" / "empty.mp4").touch()
    (root / "test" / "Jump" / "text.avi").write_text("not a video")
    (root / "test" / "Jump" / "notes.txt").write_text("not even named so")
    index, broken = build_index(root, out=tmp_path / "index.csv")
    rows = [(v.path.name, v.label, v.source, v.split, v.num_frames) for v in Index.load(tmp_path / "index.csv")]
    assert rows == [
        ("one_c01.mkv", "Archery", "Archery/one", "train", 7),
        ("two.mp4", "Jump", "test/Jump/two.mp4", "test", 8),
        ("one_c01.mp4", "Jump", "Jump/one", "train", 5),
        ("one_c02.avi", "Jump", "Jump/one", "train", 6),
    ]
    assert [(v.fps, v.width, v.height) for v in index] == [(10.0, 48, 32)] * 4
    assert sorted((p.path.name, p.kind) for p in broken) == [("empty.mp4", "empty"), ("text.avi", "broken")]
    assert all(problem.reason for problem in broken)


def test_a_file_cut_short_counts_what_decodes(tmp_path):
    whole = write_video(tmp_path / "set" / "Jump" / "whole.mkv", frames=200)
    cut = tmp_path / "set" / "Jump" / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    index, _ = build_index(tmp_path / "set")
    frames = {video.path.name: video.num_frames for video in index}
    assert frames["whole.mkv"] == 200 and 50 < frames["cut.mkv"] < 150


def test_flow_files_below_the_root_are_not_videos(tmp_path):
    write_video(tmp_path / "Jump" / "v.mp4")
    write_video(tmp_path / "flow" / "Jump" / "v.flow.mp4")
    index, _ = build_index(tmp_path)
    assert [video.path.name for video in index] == ["v.mp4"]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda root: None, {}, r"ROOT: expected a folder or an LMDB file, got '.*set'"),
        (lambda root: root.mkdir(), {},
         r"ROOT: found no video in '.*set'; expected videos \(.mp4, .*\) in ROOT, ROOT/CLASS"),
        (lambda root: (write_video(root / "a" / "v.mp4"), (root / "a" / "v.mp4").write_bytes(b"")), {},
         r"ROOT: the only video in '.*set' cannot be used; left out: 1 empty \(file without content\); the first"),
        (lambda root: root.mkdir(), {"layout": "imagenet"}, r"--layout: expected one of .*lmdb, got 'imagenet'"),
        (lambda root: root.mkdir(), {"splits": "lists"}, r"splits: layout 'folders'.* got 'lists'"),
        (lambda root: root.mkdir(), {"layout": "ucf101"}, r"splits: layout 'ucf101' needs"),
        (lambda root: root.mkdir(), {"layout": "ucf101", "splits": "lists"}, r"--splits: expected the folder"),
    ],
)  # fmt: skip
def test_a_root_that_cannot_be_indexed_is_named(make, arguments, message, tmp_path):
    make(tmp_path / "set")
    with pytest.raises(InputError, match=message):
        build_index(tmp_path / "set", out=tmp_path / "index.csv", **arguments)
    assert not (tmp_path / "index.csv").exists()


# ---- UCF101


def write_lists(folder: Path, train: list[str], test: list[str], number: int = 1) -> Path:
    folder.mkdir()
    numbers = {"Zumba": 1, "HandstandPushups": 2, "Archery": 3}
    (folder / "classInd.txt").write_text("".join(f"{place} {label}\r\n" for label, place in numbers.items()))
    rows = [f"{line} {numbers.get(line.split('/')[0], 1)}\r\n" for line in train]
    (folder / f"trainlist{number:02d}.txt").write_text("".join(rows))
    (folder / f"testlist{number:02d}.txt").write_text("".join(f"{line}\r\n" for line in test))
    return folder


def test_ucf101_lists_decide_and_the_handstand_trap_is_known(tmp_path):
    root = tmp_path / "UCF-101"
    write_video(root / "Archery" / "v_Archery_g08_c01.avi")
    write_video(root / "Archery" / "v_Archery_g08_c02.mp4")  # transcoded
    write_video(root / "Archery" / "v_Archery_g99_c01.avi")  # in no list
    write_video(root / "HandStandPushups" / "v_HandstandPushups_g01_c04.avi")  # spelled differently from the list
    write_video(root / "Zumba" / "v_Zumba_g01_c01.avi")
    splits = write_lists(
        tmp_path / "lists",
        train=["Archery/v_Archery_g08_c01.avi", "Archery/v_Archery_g08_c02.avi", "Zumba/v_Zumba_g01_c01.avi"],
        test=["HandstandPushups/v_HandStandPushups_g01_c04.avi", "Archery/v_Archery_g01_c01.avi"],
        number=2,
    )
    index, broken = build_index(root, "ucf101", splits, 2)
    assert index.classes == ["Zumba", "HandstandPushups", "Archery"]  # the official order
    assert [(v.label, v.source, v.split) for v in index] == [
        ("Zumba", "v_Zumba_g01", "train"),
        ("HandstandPushups", "v_HandStandPushups_g01", "test"),
        ("Archery", "v_Archery_g08", "train"),
        ("Archery", "v_Archery_g08", "train"),
    ]
    assert [(str(path.relative_to(root)), reason) for path, _, reason in broken] == [
        ("Archery/v_Archery_g01_c01.avi", "listed in testlist02.txt:2, not found")
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Judo/v_Judo_g01_c01.avi", r"testlist01.txt:1: class 'Judo' is not one of the 3"),
        ("Zumba/v Zumba g01", r"testlist01.txt:1: expected <class>/<video>"),
    ],
)
def test_a_bad_split_list_is_named(line, message, tmp_path):
    (tmp_path / "root").mkdir()
    splits = write_lists(tmp_path / "lists", train=[], test=[line])
    with pytest.raises(InputError, match=message):
        build_index(tmp_path / "root", "ucf101", splits)


# ---- real clips


def test_real_ucf101_clips(tmp_path, shared_data):
    subset = tmp_path / "UCF-101"
    clips = sorted((shared_data / "ucf101_100").glob("*/*.avi"))[::4]
    for clip in clips:
        (subset / clip.parent.name).mkdir(parents=True, exist_ok=True)
        (subset / clip.parent.name / clip.name).symlink_to(clip)
    index, broken = build_index(subset, "ucf101", shared_data / "splits" / "ucf101_official", 1)
    known = {}
    for line in (shared_data / "ucf101_100" / "PROBE.csv").read_text().splitlines()[1:]:
        path, frames, width, height, fps = line.split(",")[:5]
        known[Path(path).name] = (int(frames), int(width), int(height), float(fps))
    assert len(index) == len(clips) and len(index) + len(broken) == 13_320
    for video in index:
        assert (video.num_frames, video.width, video.height) == known[video.path.name][:3]
        assert video.fps == pytest.approx(known[video.path.name][3], rel=1e-3)
        assert video.source == video.path.stem[: video.path.stem.index("_c0")]


def test_real_files_in_other_codecs_and_the_broken_ones(tmp_path, shared_data):
    for name in ("corrupted.mp4", "rotated_90.mov", "h264_10bits.mp4", "mmaction2_test.avi"):
        (tmp_path / "set" / "x").mkdir(parents=True, exist_ok=True)
        shutil.copy(shared_data / "tiny" / name, tmp_path / "set" / "x" / name)
    index, broken = build_index(tmp_path / "set")
    reasons = {path.name: reason for path, _, reason in broken}
    assert reasons.keys() == {"corrupted.mp4", "rotated_90.mov"} and "270 degrees" in reasons["rotated_90.mov"]
    assert "rotated_90.mov" not in {video.path.name for video in index}
    assert {"h264_10bits.mp4", "mmaction2_test.avi"} <= {video.path.name for video in index}


class TestShortVideos:
    """CoCLR's code drops videos with frames - T // 2 * ds - 1 <= 0, where flow has one frame less than RGB."""

    def long_enough(self, tmp_path, lengths, with_flow=False, **settings):
        (tmp_path / "flow.mkv").touch()
        last = "flow.mkv" if with_flow else ""
        rows = [f"a{n}.mp4,J{n},,train,{n},10,2,2,{last}" for n in lengths]
        for n in lengths:
            (tmp_path / f"a{n}.mp4").touch()
        index = Index.load(write_index(tmp_path, *rows))
        kept = index.long_enough(DataConfig(**settings))
        assert kept.classes == index.classes  # labels agree with those of the whole index
        return [video.num_frames for video in kept]

    @pytest.mark.parametrize(("frames", "stride"), [(32, 1), (32, 6), (7, 2), (8, 1)])
    def test_dropped_as_published(self, tmp_path, frames, stride):
        lengths = list(range(1, frames * stride + 3))
        kept = self.long_enough(tmp_path, lengths, frames=frames, stride=stride, short_videos="drop")
        assert kept == [n for n in lengths if n - frames // 2 * stride - 1 > 0]

    def test_kept_by_default(self, tmp_path):
        assert self.long_enough(tmp_path, [1, 17, 18]) == [1, 17, 18]

    @pytest.mark.parametrize("flow", ["stored", "on_the_fly"])
    def test_the_frames_of_all_views_count(self, tmp_path, flow):
        lengths, stored = [17, 18, 19], flow == "stored"
        kept = self.long_enough(tmp_path, lengths, with_flow=stored, flow=flow, short_videos="drop")
        assert kept == [19]

    def test_what_is_left_out_is_logged(self, tmp_path, caplog):
        with caplog.at_level("INFO"):
            self.long_enough(tmp_path, [3, 5, 7, 9, 30], short_videos="drop")
        assert "4 of 5 videos are left out, because they have 17 frames or fewer (data.short_videos)" in caplog.text
        assert "a3.mp4, " in caplog.text and "a7.mp4, ..." in caplog.text and "a9.mp4" not in caplog.text

    def test_no_video_left(self, tmp_path):
        with pytest.raises(
            IndexFileError, match="data.short_videos: expected a video of more than 17 frames.* got 2 v"
        ):
            self.long_enough(tmp_path, [3, 17], short_videos="drop")
