"""Names of stored flow, and how it is matched to videos: equal or similar names, changed videos, unusual names."""

import os
import shlex
import shutil
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from support.data_sets.flow import gray_frames, in_pairs, read_levels, smooth_flow, write_video

from cpr_fast.cli import main
from cpr_fast.data.flow.files import FlowFiles
from cpr_fast.data.flow.levels import quantise
from cpr_fast.data.flow.names import file_names, flow_command, record_names
from cpr_fast.data.flow.records import FlowRecords
from cpr_fast.data.flow.write import write_flow
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.storage.media import read_frames


def make_index(folder, paths, frames=3) -> Index:
    """Writes index.csv, an index of videos without label, split and source."""
    videos = [Video(path, "", "", "", frames, 10.0, 48, 32) for path in paths]
    Index(videos).save(folder / "index.csv")
    return Index.load(folder / "index.csv")


def is_flow_of(video, flow_path) -> bool:
    """Returns whether stored flow is that of a video, within the error of the codecs."""
    expected = quantise(smooth_flow(in_pairs(gray_frames(video)))).numpy()
    levels = read_frames(flow_path, range(len(expected)), "flow", len(expected)).transpose(0, 3, 1, 2)
    return np.abs(levels.astype(int) - expected).max() <= 8


def shift(path, frames=3):
    """Replaces a video by one of the same size and length with other content."""
    write_video(path, frames + 5)
    with_more = gray_frames(path)[5:]
    path.unlink()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "gray"
        for image in with_more.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="gray")))
        container.mux(stream.encode(None))


SIMILAR = ["a/v.mkv", "b/v.mkv", "a/v.avi", "a/V.mkv", "a/w.MKV", "a/w.mkv", "train/a/x.mkv", "test/a/x.mkv", "a/y"]


def test_videos_of_similar_names_have_flow_of_their_own(tmp_path):
    paths = [write_video(tmp_path / name, 3) for name in SIMILAR[:-1]]
    for number, path in enumerate(paths[1:]):
        if number % 2:
            shift(path)
    make_index(tmp_path, paths)
    for storage, out in (("video", tmp_path / "flow"), ("lmdb", tmp_path / "flow.lmdb")):
        report = write_flow(tmp_path / "index.csv", out, storage=storage, compute=smooth_flow)
        assert (report["written"], report["problems"]) == (len(paths), [])
        index = Index.load(tmp_path / "index.csv")
        assert len({str(video.flow_path).casefold() for video in index}) == len(paths)
        assert all(is_flow_of(video.path, video.flow_path) for video in index)
        assert write_flow(tmp_path / "index.csv", out, storage=storage, compute=smooth_flow)["kept"] == len(paths)


def test_names_do_not_depend_on_where_the_data_set_lies(tmp_path):
    def names(folder):
        index = Index(Video(folder / name, "", "", "", 3, 10.0, 48, 32) for name in SIMILAR)
        return file_names(index, folder)

    assert names(tmp_path / "here") == names(tmp_path / "there" / "deep")
    plain = names(tmp_path)
    assert str(plain[1]) == "b/v.flow.mp4" and str(plain[-1]) == "a/y.flow.mp4"  # the usual name if no other is similar


def test_flow_of_urls_members_and_pictures_has_names_of_its_own(tmp_path, monkeypatch):
    paths = {
        "https://host/b/walk/v.mp4?key=1%2F2&at=3": "host/b/walk/v.flow.mp4",
        "https://host/s.tar?key=4#512+9/walk/w?.mp4": "host/s.tar/walk/w?.flow.mp4",
        "s3://bucket/x:/v.mp4": "bucket/x:/v.flow.mp4",
        tmp_path / "in" / "s.tar#512+9/run/v.mp4": "in/s.tar/run/v.flow.mp4",
        tmp_path / "in" / "s3:" / "v.mp4": "in/s3:/v.flow.mp4",
        tmp_path / "in" / "clip" / "img_%05d.jpg": "in/clip.flow.mp4",
    }
    # equal but for the query, or for the place in the tar file
    same = ["https://host/get.mp4?id=1", "https://host/get.mp4?id=2", tmp_path / "t.tar#512+9/a.mp4",
            tmp_path / "t.tar#2048+9/a.mp4"]  # fmt: skip
    index = Index(Video(Path(path), "", "", "", 3, 10.0, 48, 32) for path in [*paths, *same])
    names = []
    for here in (tmp_path, Path("/")):  # they do not depend on the working directory
        monkeypatch.chdir(here)
        names.append((file_names(index, tmp_path), record_names(index, tmp_path)))
    assert names[0] == names[1] and list(map(str, names[0][0]))[: len(paths)] == list(paths.values())
    assert all(len(set(found)) == len(index) for found in names[0])
    assert not any("key=" in str(name) or "id=" in str(name) for found in names[0] for name in found)


@pytest.mark.parametrize("storage", ["video", "lmdb"])
def test_the_flow_of_a_video_that_changed_is_computed_again(tmp_path, storage):
    paths = [write_video(tmp_path / "a" / f"{name}.mkv", 3) for name in "vw"]
    make_index(tmp_path, paths)
    out = tmp_path / ("flow" if storage == "video" else "flow.lmdb")
    write_flow(tmp_path / "index.csv", out, storage=storage, compute=smooth_flow)
    shift(paths[0])
    os.utime(paths[1])  # a new time but the same bytes, as after a copy or a checkout
    report = write_flow(tmp_path / "index.csv", out, storage=storage, compute=smooth_flow)
    assert (report["written"], report["kept"]) == (1, 1)
    assert all(is_flow_of(video.path, video.flow_path) for video in Index.load(tmp_path / "index.csv"))
    paths[0].write_bytes(b"not a video any more")
    report = write_flow(tmp_path / "index.csv", out, storage=storage, compute=smooth_flow)
    assert (report["counts"], report["without_flow"]) == ({"broken": 1}, 1)
    assert [video.flow_path is None for video in Index.load(tmp_path / "index.csv")] == [True, False]


@pytest.mark.parametrize("storage", ["video", "lmdb"])
def test_two_indexes_with_one_folder_of_flow(tmp_path, storage):
    """Both have a video a/v.mkv: the second run neither uses nor replaces the flow of the first one."""
    out = tmp_path / ("flow" if storage == "video" else "flow.lmdb")
    for name in ("one", "two"):
        path = write_video(tmp_path / name / "a" / "v.mkv", 3)
        if name == "two":
            shift(path)
        make_index(tmp_path / name, [path])
        report = write_flow(tmp_path / name / "index.csv", out, storage=storage, compute=smooth_flow)
        assert (report["written"], report["kept"]) == (1, 0)
    for name in ("one", "two"):
        report = write_flow(tmp_path / name / "index.csv", out, storage=storage, compute=smooth_flow)
        assert (report["written"], report["kept"]) == (0, 1)
        video = Index.load(tmp_path / name / "index.csv")[0]
        assert is_flow_of(video.path, video.flow_path)


def test_a_data_set_that_moved_keeps_its_flow(tmp_path):
    path = write_video(tmp_path / "here" / "a" / "v.mkv", 3)
    make_index(tmp_path / "here", [path])
    write_flow(tmp_path / "here" / "index.csv", tmp_path / "here" / "flow", compute=smooth_flow)
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copyfile)  # modification times differ
    report = write_flow(tmp_path / "there" / "index.csv", tmp_path / "there" / "flow", compute=smooth_flow)
    assert (report["written"], report["kept"]) == (0, 1)


def test_a_flow_file_that_is_cut_off_or_empty_is_computed_again(tmp_path):
    paths = [write_video(tmp_path / "a" / f"{name}.mkv", 3) for name in "vwx"]
    make_index(tmp_path, paths)
    write_flow(tmp_path / "index.csv", tmp_path / "flow", compute=smooth_flow)
    flow = [video.flow_path for video in Index.load(tmp_path / "index.csv")]
    flow[0].write_bytes(flow[0].read_bytes()[:-300])
    flow[1].write_bytes(b"")
    report = write_flow(tmp_path / "index.csv", tmp_path / "flow", compute=smooth_flow)
    assert (report["written"], report["kept"]) == (2, 1)
    assert all(len(read_levels(path, 48)) == 2 for path in flow)


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system takes UTF-8 names only")
@pytest.mark.parametrize("storage", ["video", "lmdb"])
def test_names_that_are_not_utf8_or_very_long(tmp_path, storage):
    """Such names are written as their bytes. The index is built in memory, with names as a program that keeps these
    bytes would read them.
    """
    names = [os.fsdecode(b"caf\xe9"), "x" * 250, "with space, comma #1"]
    paths = [write_video(tmp_path / "plain.mkv", 3).rename(tmp_path / f"{name}.mkv") for name in names]
    index = Index(Video(path, "", "", "", 3, 10.0, 48, 32) for path in paths)
    make, out = (FlowFiles, tmp_path / "flow") if storage == "video" else (FlowRecords, tmp_path / "flow.lmdb")
    with make(index, tmp_path, out, (0, 1)) as store:
        for position, path in enumerate(paths):
            assert not store.holds(position)
            store.write(position, quantise(smooth_flow(in_pairs(gray_frames(path)))).numpy())
    found = make.found(index, tmp_path, out=out)
    assert all(is_flow_of(path, flow) for path, (_, flow) in zip(paths, found, strict=True))
    assert len(set(record_names(index, tmp_path))) == 3


def test_names_as_other_programs_expect_them(tmp_path):
    """Names are CoCLR's class/video, or the whole path with its suffix if that is not unique; a digest is the last
    resort.
    """

    def index_of(*names):
        return Index(Video(tmp_path / name, "", "", "", 3, 10.0, 48, 32) for name in names)

    assert [str(name) for name in file_names(index_of("A/v.avi", "A/v.mkv", "A/w.mkv", "B/v.mkv"), tmp_path)] == [
        "A/v.avi.flow.mp4",
        "A/v.mkv.flow.mp4",
        "A/w.flow.mp4",
        "B/v.flow.mp4",
    ]
    records = record_names(index_of("train/A/v.mkv", "test/A/v.mkv", "train/B/v.mkv"), tmp_path)
    assert records == ["train/A/v.mkv", "test/A/v.mkv", "B/v"]
    crossed = file_names(index_of("v.avi", "v.mkv", "v.avi.mp4", "V.AVI"), tmp_path)
    assert len({str(name).casefold() for name in crossed}) == 4


@pytest.mark.parametrize(
    ("storage", "out", "shard"),
    [
        ("video", "my flow", (0, 1)),
        ("video", "set/flow", (1, 2)),
        ("lmdb", "f.lmdb", (0, 1)),
        ("lmdb", "f.lmdb", (1, 2)),
    ],
)
def test_the_command_that_completes_the_flow_names_its_place(tmp_path, monkeypatch, storage, out, shard):
    """Two videos share their stem, so that their flow has other names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cpr_fast.data.flow.levels.tvl1_flow", lambda pairs: smooth_flow(pairs)[:, None])
    paths = [tmp_path / "set" / name for name in ("v.mkv", "v.avi", "w.mkv")]
    for path in paths:
        write_video(path, 3)
    make_index(tmp_path, paths)
    assert flow_command(Path("index.csv"), Index.load("index.csv")) == "cpr-fast flow index.csv --out flow"
    write_flow("index.csv", out, storage=storage, shard=shard)
    command = flow_command(Path("index.csv"), Index.load("index.csv", require_flow=False))
    as_lmdb = ["--storage", "lmdb"] if storage == "lmdb" else []
    assert shlex.split(command) == ["cpr-fast", "flow", "index.csv", "--out", out, *as_lmdb]
    assert main(shlex.split(command)[1:]) == 0
    assert all(video.flow_path for video in Index.load("index.csv"))
