"""Extracted frames as MMAction2 and TSN write them: listed, decoded as PIL decodes them, named if some are missing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.data_sets.flow import smooth_flow

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.clips.reader import fetch_jpegs
from cpr_fast.data.clips.sampling import Sources, plan_pairs
from cpr_fast.data.files.names import is_frames, plain_path
from cpr_fast.data.flow.origin import Origin
from cpr_fast.data.flow.write import write_flow
from cpr_fast.data.index.build import IndexOptions, write_index
from cpr_fast.data.index.formats.frames import sequences
from cpr_fast.data.index.index import Index
from cpr_fast.data.storage.media import file_of, frame_size, read_frames, read_parts, state_of
from cpr_fast.data.storage.pictures import first_number
from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.pixels import Region
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.cache import video_digests

FRAMES = 20


def write_frames(
    folder: Path, template: str = "img_%05d.jpg", first: int = 1, *, flow: str = "", seed: int = 0
) -> Path:
    """Writes noise as pictures of 40x32, with `flow` beside: the first letters of the names of its two components."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (FRAMES, 32, 40, 3), np.uint8)
    for number, frame in enumerate(noise):
        Image.fromarray(frame).save(folder / (template % (first + number)), quality=90)
        for channel, name in enumerate(flow.split() if number < FRAMES - 1 else []):
            Image.fromarray(frame[..., channel]).save(folder / (f"{name}%05d.jpg" % (first + number)), quality=90)
    return folder / template


def opened(path: Path, mode: str = "RGB") -> np.ndarray:
    with Image.open(path) as picture:
        picture.draft(mode, picture.size)  # of a JPEG: the luma as it is stored
        return np.asarray(picture.convert(mode))


@pytest.mark.parametrize(
    "template, first",
    [("img_%05d.jpg", 1), ("image%d.JPEG", 0), ("%06d.png", 0), ("f.%03d.png", 1), ("f_%010d.jpg", 1)],
)
def test_frames_are_those_that_pil_decodes(tmp_path, template, first):
    path = write_frames(tmp_path / "a 1.5", template, first)
    assert list(sequences([file.name for file in path.parent.iterdir()])) == [template]
    numbers = [0, 3, 11, 19]
    truth = np.stack([opened(path.with_name(template % (first + number))) for number in numbers])
    assert is_frames(path) and frame_size(path) == (FRAMES, 32, 40)
    assert np.array_equal(read_frames(path, numbers, "rgb", FRAMES), truth)
    part = Region.whole(32, 40)
    cut = np.concatenate(list(read_parts(path, numbers, "rgb", FRAMES, part)))
    assert np.array_equal(cut, truth)
    gray = np.stack([opened(path.with_name(template % (first + number)), "L") for number in numbers]).astype(int)
    assert abs(read_frames(path, numbers, "gray", FRAMES).astype(int) - gray).max() <= (template.endswith("png"))


@pytest.mark.parametrize("flow", ["flow_x_ flow_y_", "x_ y_"])
def test_folders_of_frames_with_flow_are_indexed_and_read(tmp_path, flow):
    for number, clip in enumerate(("run/a", "run/b", "walk/a", "walk/v_w_g01_c01")):
        write_frames(tmp_path / "set" / clip, flow=flow, seed=number)
    (tmp_path / "set" / "run" / "a" / "poster.jpg").write_bytes(b"")
    report = write_index(tmp_path / "set", tmp_path / "i.csv", IndexOptions("rawframes"))
    index = Index.load(tmp_path / "i.csv")
    assert [(v.label, v.source, v.num_frames, v.width, v.height) for v in index] == [
        ("run", "run/a", 20, 40, 32), ("run", "run/b", 20, 40, 32), ("walk", "walk/a", 20, 40, 32),
        ("walk", "walk/v_w_g01", 20, 40, 32),
    ]  # fmt: skip
    assert not set(report["counts"]) - {"short"} and report["without_flow"] == 0
    video, u = index[1], flow.split()[0]
    assert video.flow_path == tmp_path / "set/run/b" / f"{u}%05d.jpg" and plain_path(video.path).name == "b"
    found = read_frames(video.flow_path, [0, 18], "flow", 19)
    for place, number in enumerate((1, 19)):
        for channel, name in enumerate(flow.split()):
            truth = opened(tmp_path / "set/run/b" / f"{name}{number:05d}.jpg", "L")
            assert np.array_equal(found[place, ..., channel], truth)


def test_training_reads_clips_of_rgb_and_flow_from_pictures(tmp_path):
    for number in range(4):
        write_frames(tmp_path / "set" / str(number), flow="flow_x_ flow_y_", seed=number)
    write_index(tmp_path / "set", tmp_path / "i.csv", IndexOptions("rawframes", classes=False))
    index = Index.load(tmp_path / "i.csv")
    data = DataConfig(frames=8, size=16, batch_size=4, workers=2)
    loader = TrainLoader(index, data, ["rgb", "flow"], seed=1)
    (batch,) = loader.epoch(0)
    loader.close()
    assert not loader.skipped and batch.clips["rgb"].shape == batch.clips["flow"].shape == (4, 2, 3, 8, 16, 16)
    clips = plan_pairs(Sources.of(index, data), np.array([2]), data, 1, 0)
    files = sorted(index[2].path.parent.glob("img_*"))
    for start, jpegs in zip(clips.start, fetch_jpegs(index[2], clips, "rgb", data), strict=True):
        assert [bytes(jpeg) for jpeg in jpegs] == [file.read_bytes() for file in files[start : start + 8]]


def test_missing_damaged_and_odd_pictures_are_named(tmp_path):
    path = write_frames(tmp_path / "set" / "a", seed=1)
    path.with_name("img_00008.jpg").unlink()
    second = write_frames(tmp_path / "set" / "b", first=7)
    write_frames(tmp_path / "set" / "c")
    third = tmp_path / "set" / "c" / "img_%05d.jpg"
    third.with_name("img_00005.jpg").write_bytes(b"no picture")
    Image.fromarray(np.zeros((10, 10, 3), np.uint8)).save(third.with_name("img_00007.jpg"))
    sizes = write_frames(tmp_path / "set" / "d")
    Image.fromarray(np.zeros((10, 12, 3), np.uint8)).save(sizes.with_name("img_00007.jpg"))
    report = write_index(tmp_path / "set", tmp_path / "i.csv", IndexOptions("rawframes"))
    kept = [(v.path.parent.name, v.num_frames) for v in Index.load(tmp_path / "i.csv")]
    assert kept == [("a", 7), ("c", 4), ("d", 6)]
    assert report["counts"] == {"broken": 1, "damaged": 2, "short": 3, "size_change": 1}
    reasons = "\n".join(problem["reason"] for problem in report["problems"])
    assert "img_00008.jpg is missing" in reasons and "to be 'img_00000.jpg' or 'img_00001.jpg'" in reasons
    assert "img_00005.jpg does not decode" in reasons and "changes from 40x32 to 12x10" in reasons
    assert second.parent.name == "b"
    with pytest.raises(VideoError, match="img_00008.jpg is missing"):
        read_frames(path, [6, 7], "rgb", 20)
    with pytest.raises(VideoError, match="holds 7 frames, the index says 25"):
        read_frames(path, [0], "rgb", 25)
    with pytest.raises(VideoError, match="the frame size changes from"):
        read_frames(third, [5, 6], "rgb", 20)
    with pytest.raises(VideoError, match="names begin with flow_x or x_"):
        read_frames(third, [5], "flow", 19)
    with pytest.raises(VideoError, match="neither") as failed:
        first_number(tmp_path / "nowhere" / "img_%05d.jpg")
    assert failed.value.unreadable


def test_flow_of_pictures_is_computed_and_kept_until_they_change(tmp_path):
    paths = [write_frames(tmp_path / "set" / name, seed=number) for number, name in enumerate("ab")]
    write_index(tmp_path / "set", tmp_path / "i.csv", IndexOptions("rawframes"))

    def counts(storage: str) -> tuple[int, int]:
        out = tmp_path / ("flow.lmdb" if storage == "lmdb" else "flow")
        report = write_flow(tmp_path / "i.csv", out, compute=smooth_flow, storage=storage)
        return report["written"], report["kept"]

    for storage in ("lmdb", "video"):
        assert counts(storage) == (2, 0) and counts(storage) == (0, 2)
    stored = [video.flow_path for video in Index.load(tmp_path / "i.csv")]
    assert stored == [tmp_path / "flow" / "set" / f"{name}.flow.mp4" for name in "ab"]
    write_frames(tmp_path / "set" / "b", seed=7)
    assert counts("video") == (1, 1) and Origin.of(paths[0]).describes(paths[0])
    assert not Origin.of(paths[0]).describes(paths[1])


@pytest.mark.parametrize("first", [0, 1])
def test_the_state_of_pictures_changes_with_them(tmp_path, first):
    path = write_frames(tmp_path / "a", first=first)
    before, folder = state_of(path), os.stat(path.parent).st_mtime_ns
    assert state_of(path) == before and file_of(path) == path
    os.utime(path.with_name(path.name % first), ns=(0, folder + 10**9))  # written again in place
    assert os.stat(path.parent).st_mtime_ns == folder and state_of(path) == (before[0], folder + 10**9)
    with pytest.raises(FileNotFoundError):
        state_of(tmp_path / "none" / "img_%05d.jpg")


def test_the_features_of_pictures_are_kept_by_their_state(tmp_path):
    for number, name in enumerate("abcd"):
        write_frames(tmp_path / "set" / ("train" if number < 2 else "test") / name, flow="flow_x_ flow_y_", seed=number)
    write_index(tmp_path / "set", tmp_path / "i.csv", IndexOptions("rawframes", classes=False))
    index = Index.load(tmp_path / "i.csv")
    assert all(len(set(video_digests(index, view))) == 4 for view in ("rgb", "flow"))


def test_annotation_lists_of_mmaction2_and_tsn(tmp_path):
    for clip in ("s/a", "s/b 2"):
        write_frames(tmp_path / clip, flow="flow_x_ flow_y_")
    (tmp_path / "ann_train.txt").write_text("s/a 20 3\ns/b 2 20 1\ns/none 20 1\n")
    report = write_index(tmp_path / "ann_train.txt", tmp_path / "i.csv", IndexOptions("list"))
    index = Index.load(tmp_path / "i.csv")
    assert [(v.path.parent.name, v.label, v.split, v.flow_path.name) for v in index] == [
        ("b 2", "1", "train", "flow_x_%05d.jpg"), ("a", "3", "train", "flow_x_%05d.jpg")
    ]  # fmt: skip
    assert report["counts"]["missing"] == 1


def test_folders_without_frames_are_refused(tmp_path):
    write_frames(tmp_path / "set", "flow_x_%05d.jpg")
    write_frames(tmp_path / "set", "flow_y_%05d.jpg")
    with pytest.raises(InputError, match="ROOT: expected folders of pictures named img_00001.jpg"):
        write_index(tmp_path / "set", tmp_path / "i.csv", IndexOptions("rawframes"))
    with pytest.raises(InputError, match="--layout rawframes reads extracted frames"):
        write_index(tmp_path / "set", tmp_path / "i.csv", IndexOptions())
    with pytest.raises(InputError, match="ROOT: --layout rawframes reads files of this machine"):
        write_index(Path("s3://bucket/frames"), tmp_path / "i.csv", IndexOptions("rawframes"))
