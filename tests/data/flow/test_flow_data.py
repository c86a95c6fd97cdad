"""Flow files: what is stored is what was computed, and a killed or sharded run ends up whole."""

import io
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.reader import fetch_frames
from cpr_fast.data.flow.levels import FlowSolver, dequantise, pair_flow, quantise
from cpr_fast.data.flow.write import pack, solve, write_flow
from cpr_fast.data.index.build import build_index
from cpr_fast.data.index.index import Index
from cpr_fast.data.storage.records import frame_size, open_records, split_record
from cpr_fast.data.video.container import VideoError
from cpr_fast.errors import InputError
from cpr_fast.ops import tvl1_flow

LEVEL = 40 / 255  # pixels
LONG = 35  # frames of the longest video, more than two batches hold


def smooth_flow(pairs: torch.Tensor) -> torch.Tensor:
    """A stand-in for TV-L1: a field that depends on both frames of the pair. [P, 2, H, W] -> [P, 2, H, W]."""
    assert pairs.dtype == torch.uint8 and pairs.shape[1] == 2
    first, second = pairs[:, 0].float(), pairs[:, 1].float()
    rows = torch.linspace(0, 3, pairs.shape[2])[:, None].expand_as(first)
    return torch.stack([second.mean((1, 2), keepdim=True) / 10 - rows, 5 - first / 20], dim=1)


def in_pairs(gray: torch.Tensor) -> torch.Tensor:
    """[N, H, W] to [N - 1, 2, H, W]."""
    return torch.stack([gray[:-1], gray[1:]], dim=1)


def write_video(path: Path, frames: int, width: int = 48, height: int = 32) -> Path:
    """Each frame a ramp of its own brightness, lossless."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 90, width).astype(np.uint8)[None, :]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "gray"
        for i in range(frames):
            image = np.repeat(ramp + np.uint8(7 * i % 120), height, axis=0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="gray")))
        container.mux(stream.encode(None))
    return path


def gray_frames(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        return torch.from_numpy(np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)]))


def read_levels(path: Path, width: int) -> np.ndarray:
    """A flow file read by nothing but FFmpeg: uint8 [N - 1, 2, H, W]."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    planes = [np.frombuffer(f.planes[0], np.uint8).reshape(f.height, -1)[:, : f.width] for f in frames]
    return np.stack(planes).reshape(len(frames), 2, frames[0].height // 2, -1)[..., :width]


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """Five videos of several lengths, one longer than a batch (16 pairs), one with an odd width."""
    monkeypatch.setattr("cpr_fast.data.flow.write.batch_pixels", lambda device: 16 * 48 * 32)
    lengths = {"train/A/a_c01": 6, "train/A/a_c02": 2, "train/B/b": LONG, "test/A/c": 9, "test/B/d": 5}
    for name, frames in lengths.items():
        write_video(tmp_path / "set" / f"{name}.mkv", frames, width=49 if name.endswith("d") else 48)
    build_index(tmp_path / "set", out=tmp_path / "set" / "index.csv")
    return tmp_path / "set" / "index.csv"


# ---- quantisation


def test_quantisation_is_the_published_one():
    flow = torch.tensor([0.0, -0.0, 1e-9, -20, 20, -1e6, 1e6, 19.93, 10, -3.7])
    assert quantise(flow).tolist() == [128, 128, 128, 0, 255, 0, 255, 255, 191, 104]
    everywhere = torch.linspace(-20, 20, 100_001, dtype=torch.float64)
    np.testing.assert_array_equal(quantise(everywhere), np.round((everywhere.numpy() + 20) * 255 / 40))
    assert quantise(torch.zeros(3, 2)).dtype == torch.uint8


def test_quantisation_errs_by_half_a_level_at_most():
    flow = torch.from_numpy(np.random.default_rng(0).uniform(-20, 20, 100_000).astype(np.float32))
    error = dequantise(quantise(flow)) - flow
    assert error.abs().max() < LEVEL / 2 + 1e-5
    assert quantise(dequantise(torch.arange(256, dtype=torch.uint8))).tolist() == list(range(256))


# ---- whole data sets


def test_flow_files_hold_what_was_computed(data_set, tmp_path):
    report = write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    assert report.pop("pairs_per_s") > 0
    pairs = sum(video.num_frames - 1 for video in Index.load(data_set))
    assert report == {"index": str(data_set), "videos": 5, "written": 5, "kept": 0, "pairs": pairs, "counts": {},
                      "problems": []}  # fmt: skip
    index = Index.load(data_set)
    for video in index:
        expected = smooth_flow(in_pairs(gray_frames(video.path))).numpy()
        stored = read_levels(video.flow_path, video.width)
        assert stored.shape == expected.shape == (video.num_frames - 1, 2, video.height, video.width)
        error = dequantise(torch.from_numpy(stored)).numpy() - np.clip(expected, -20, 20)
        assert np.sqrt(np.mean(error**2)) < 0.07 and np.abs(error).max() < 0.5
    assert not list(tmp_path.rglob("*.part"))


def test_flow_files_are_what_hardware_decoders_take(data_set, tmp_path):
    write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    for video in Index.load(data_set):
        with av.open(str(video.flow_path)) as container:
            stream = container.streams.video[0]
            frames = list(container.decode(stream))
            assert stream.codec_context.name == "h264" and stream.codec_context.profile in ("High", "Main")
        assert {frame.format.name for frame in frames} <= {"yuv420p", "yuvj420p"}
        assert all(frame.color_range == 2 for frame in frames)  # full: 0 and 255 mean what they say
        chroma = frames[-1].to_ndarray(format="yuv420p")[frames[-1].height :]
        assert frames[0].key_frame and np.abs(chroma.astype(int) - 128).max() <= 1


def clips_from(video, start):
    """The clip of whole frames from there on."""
    from support.numbered_videos import clips_at  # not on the path of the processes that import this module

    return clips_at(video, [start])


def test_the_loader_reads_them_and_an_odd_width_too(data_set, tmp_path):
    write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    for video in Index.load(data_set):
        if video.num_frames < 5:
            continue
        clip = fetch_frames(video, clips_from(video, 1), "flow", DataConfig(frames=3, size=16))[0]
        expected = read_levels(video.flow_path, video.width)[1:4].transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(clip, expected)


def test_a_second_run_computes_nothing(data_set, tmp_path):
    write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    before = data_set.read_text()

    def refuse(frames):
        raise AssertionError("computed again")

    report = write_flow(data_set, tmp_path / "flow", compute=refuse)
    assert (report["written"], report["kept"]) == (0, 5) and data_set.read_text() == before


def test_a_file_of_the_wrong_length_is_made_again(data_set, tmp_path):
    write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    videos = {video.num_frames: video for video in Index.load(data_set)}
    os.replace(videos[6].flow_path, videos[9].flow_path)  # 5 fields where 8 belong, and none where 5 do
    report = write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    assert (report["written"], report["kept"]) == (2, 3)
    assert len(read_levels(videos[9].flow_path, 48)) == 8


@pytest.mark.parametrize("count", [2, 3, 7])
def test_shards_at_the_same_time_are_the_whole(count, data_set, tmp_path):
    whole = write_flow(data_set, tmp_path / "whole", compute=smooth_flow)

    def run(i):
        return write_flow(data_set, tmp_path / "flow", compute=smooth_flow, shard=(i, count))

    with ThreadPoolExecutor(count) as pool:
        reports = list(pool.map(run, range(count)))
    assert sum(report["written"] for report in reports) == whole["written"] == 5
    files = {path.relative_to(tmp_path / "flow"): path.read_bytes() for path in (tmp_path / "flow").rglob("*.mp4")}
    assert files == {
        path.relative_to(tmp_path / "whole"): path.read_bytes() for path in (tmp_path / "whole").rglob("*.mp4")
    }
    assert all("whole" not in video.flow_path.parts and video.flow_path.is_file() for video in Index.load(data_set))


def test_a_killed_run_leaves_no_half_file_and_is_continued(data_set, tmp_path):
    """The process dies, without any clean-up, while it encodes its third video."""
    script = f"""
        import os, av
        from pathlib import Path
        from cpr_fast.data import flow
        from tests.data.flow.test_flow_data import smooth_flow
        replace, done = os.replace, []
        def die_at_the_third(source, target):
            if len(done) == 2 and str(target).endswith(".flow.mp4"):
                os._exit(9)
            done.append(target)
            replace(source, target)
        os.replace = die_at_the_third
        flow.write_flow({str(data_set)!r}, {str(tmp_path / "flow")!r}, compute=smooth_flow)
    """
    root = Path(__file__).parents[3]
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=root)
    assert killed.returncode == 9
    complete = list((tmp_path / "flow").rglob("*.flow.mp4"))
    assert len(complete) == 2 and all(len(read_levels(path, 48)) for path in complete)
    assert all(video.flow_path is None for video in Index.load(data_set))
    report = write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    assert (report["written"], report["kept"]) == (3, 2)
    assert not list(tmp_path.rglob("*.part"))
    assert all(video.flow_path is not None for video in Index.load(data_set))


def test_a_failure_while_encoding_stops_the_run_and_leaves_no_half_file(data_set, tmp_path, monkeypatch):
    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cpr_fast.data.flow.files.os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    assert not [path for path in (tmp_path / "flow").rglob("*") if path.is_file()]


def test_videos_that_cannot_be_read_are_skipped_by_name(data_set, tmp_path):
    videos = {video.num_frames: video for video in Index.load(data_set)}
    videos[6].path.write_bytes(b"not a video any more")
    videos[9].path.write_bytes(videos[LONG].path.read_bytes()[:400])
    write_video(videos[5].path, 4, width=49)
    report = write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    assert report["written"] == 2
    named = {row["path"]: row["reason"] for row in report["problems"]}
    assert named.keys() == {str(videos[n].path) for n in (5, 6, 9)} and report["counts"] == {"broken": 3}
    assert "frame 4 of 5 does not decode" in named[str(videos[5].path)]
    with_flow = {video.num_frames for video in Index.load(data_set) if video.flow_path}
    assert with_flow == {2, LONG}


def test_a_single_frame_has_no_flow(tmp_path):
    write_video(tmp_path / "A" / "one.mkv", 1)
    write_video(tmp_path / "A" / "two.mkv", 2)
    build_index(tmp_path, out=tmp_path / "index.csv")
    report = write_flow(tmp_path / "index.csv", tmp_path / "flow", compute=smooth_flow)
    assert [row["reason"] for row in report["problems"]] == ["has a single frame: no flow"]
    assert report["counts"] == {"too_short": 1}


def test_videos_outside_the_folder_of_the_index(tmp_path):
    write_video(tmp_path / "videos" / "A" / "v.mkv", 3)
    build_index(tmp_path / "videos", out=tmp_path / "lists" / "deep" / "index.csv")
    write_flow(tmp_path / "lists" / "deep" / "index.csv", tmp_path / "flow", compute=smooth_flow)
    video = Index.load(tmp_path / "lists" / "deep" / "index.csv")[0]
    assert video.flow_path.resolve() == (tmp_path / "flow" / "videos" / "A" / "v.flow.mp4").resolve()


def test_two_videos_never_share_a_flow_file(tmp_path):
    write_video(tmp_path / "A" / "v.mkv", 3)
    write_video(tmp_path / "A" / "v.avi", 3)
    build_index(tmp_path, out=tmp_path / "index.csv")
    write_flow(tmp_path / "index.csv", tmp_path / "flow", compute=smooth_flow)
    flow = {video.path.name: video.flow_path.relative_to(tmp_path) for video in Index.load(tmp_path / "index.csv")}
    assert flow == {name: Path("flow", "A", f"{name}.flow.mp4") for name in ("v.avi", "v.mkv")}


def test_one_video_whose_flow_fails_stops_nothing_and_is_tried_again(data_set, tmp_path, caplog):
    """The others share its batches."""
    videos = {video.num_frames: video for video in Index.load(data_set)}
    bad = gray_frames(videos[9].path)[4]

    def fail(pairs):
        if any(torch.equal(pair[0], bad) for pair in pairs if pair[0].shape == bad.shape):
            raise RuntimeError("no convergence")
        return smooth_flow(pairs)

    report = write_flow(data_set, tmp_path / "flow", compute=fail)
    lost = [row["path"] for row in report["problems"]]
    assert str(videos[9].path) in lost and report["counts"] == {"failed": len(lost)} and len(lost) < 4
    assert report["problems"][0]["reason"] == "RuntimeError: no convergence"
    assert all(f"no flow of {path}: RuntimeError" in caplog.text for path in lost)
    assert {str(video.path) for video in Index.load(data_set) if video.flow_path is None} == set(lost)
    again = write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    assert (again["written"], again["kept"], again["problems"]) == (len(lost), 5 - len(lost), [])


def test_nothing_that_works_is_bad_input(data_set, tmp_path):
    def fail(pairs):
        raise RuntimeError("the device is gone")

    with pytest.raises(InputError, match="none of 5 videos gave flow; the first: .*RuntimeError: the device is gone"):
        write_flow(data_set, tmp_path / "flow", compute=fail)


@pytest.mark.parametrize("pairs", [1, 2, 7, 1000])
def test_batches_of_pairs_across_videos_change_no_bit(pairs):
    """Real flow of videos of two sizes, one unreadable, in batches of every kind, beside each pair alone."""
    rng = np.random.default_rng(0)
    shapes = [(4, 24, 30), (2, 24, 30), (6, 24, 30), (3, 20, 24)]
    videos = [rng.integers(0, 256, shape).astype(np.uint8) for shape in shapes]
    solver = FlowSolver(torch.device("cpu"))
    batches = list(pack([(0, videos[0]), (1, videos[1]), (9, VideoError("x", "gone")), (2, videos[2]), (3, videos[3])],
                        pairs * 24 * 30))  # fmt: skip
    whole: dict[int, list] = {}
    for batch in batches:
        for segment, levels in solve(batch, solver):
            whole.setdefault(segment.position, []).append(levels)
    assert isinstance(whole.pop(9)[0], VideoError)
    assert len(batches) == 1 + {1: 9 + 2, 2: 5 + 1, 7: 2 + 1, 1000: 1 + 1}[pairs]
    for position, gray in enumerate(videos):
        alone = [quantise(pair_flow(torch.from_numpy(gray[None, i : i + 2]))) for i in range(len(gray) - 1)]
        np.testing.assert_array_equal(np.concatenate(whole[position]), torch.cat(alone).numpy())


def test_the_real_flow_of_a_batch_is_tvl1s():
    gray = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (4, 20, 30)).astype(np.uint8))
    assert torch.equal(pair_flow(in_pairs(gray)), tvl1_flow(gray))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "device: expected 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
        ("meta", "expected 'cpu'"),
        ("cuda:99", "device: got 'cuda:99', but torch sees"),
    ],
)
def test_an_impossible_device_is_named(device, message, data_set, tmp_path):
    with pytest.raises(InputError, match=message):
        write_flow(data_set, tmp_path / "flow", device=device)


@pytest.mark.parametrize("shard", [(1, 1), (-1, 2), (0, 0)])
def test_an_impossible_shard_is_named(shard, data_set, tmp_path):
    with pytest.raises(InputError, match="shard: expected"):
        write_flow(data_set, tmp_path / "flow", compute=smooth_flow, shard=shard)


# ---- as records of an LMDB file


def test_records_are_in_coclrs_format_and_both_storages_give_the_same_clips(data_set, tmp_path):
    """The loader's clips differ by what H.264 and JPEG lose: a few levels of .157 px."""
    write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    files = list(Index.load(data_set))
    report = write_flow(data_set, tmp_path / "flow.lmdb", storage="lmdb", compute=smooth_flow)
    assert (report["written"], report["kept"]) == (5, 0)
    records = list(Index.load(data_set))
    for file, record in zip(files, records, strict=True):
        assert record.flow_path.resolve() == tmp_path / f"flow.lmdb#{file.path.parent.name}" / file.path.stem
        expected = quantise(smooth_flow(in_pairs(gray_frames(file.path)))).numpy().transpose(0, 2, 3, 1)
        data = DataConfig(frames=min(4, file.num_frames - 1), size=16)
        clips = [fetch_frames(video, clips_from(video, 0), "flow", data)[0].astype(int) for video in (file, record)]
        errors = [np.abs(clip - expected[: data.frames]) * LEVEL for clip in clips]
        assert all(error.mean() < 0.1 and error.max() < 5 * LEVEL for error in errors)
        assert np.abs(clips[0] - clips[1]).mean() * LEVEL < 0.15
    stored = open_records(tmp_path / "flow.lmdb")
    assert stored.num_frames() == {f"{v.path.parent.name}/{v.path.stem}": v.num_frames - 1 for v in records}
    picture = Image.open(io.BytesIO(stored.record("A/a_c01")[0][slice(*jpeg_span(stored, "A/a_c01", 2))]))
    expected = quantise(smooth_flow(in_pairs(gray_frames(records[0].path)))).numpy()[2]
    constant, v, u = np.asarray(picture.convert("RGB")).astype(int).transpose(2, 0, 1)  # as CoCLR's loader reads it
    assert (
        np.abs(constant - 128).max() <= 4 and np.abs(u - expected[0]).max() <= 4 and np.abs(v - expected[1]).max() <= 4
    )


def jpeg_span(records, name: str, frame: int) -> tuple[int, int]:
    offset, size = records.record(name)[1][frame].tolist()
    return offset, offset + size


def test_a_killed_run_of_records_is_continued_and_no_half_video_counts(data_set, tmp_path):
    script = f"""
        import os
        from cpr_fast.data.flow import write as flow
        from cpr_fast.data.storage import record_writer
        from tests.data.flow.test_flow_data import smooth_flow
        commit, done = record_writer.RecordWriter._commit, []
        def die_at_the_third(self, entries):
            if len(done) == 2:
                with self._environment.begin(write=True) as transaction:
                    for key, value in entries.items():
                        transaction.put(key, value)
                    os._exit(9)
            done.append(1)
            commit(self, entries)
        record_writer.RecordWriter._commit = die_at_the_third
        flow.write_flow({str(data_set)!r}, {str(tmp_path / "flow.lmdb")!r}, storage="lmdb", compute=smooth_flow)
    """
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=root).returncode == 9
    assert not (tmp_path / "flow.lmdb").exists()
    assert all(video.flow_path is None for video in Index.load(data_set))
    report = write_flow(data_set, tmp_path / "flow.lmdb", storage="lmdb", compute=smooth_flow)
    assert (report["written"], report["kept"]) == (3, 2)
    assert all(frame_size(video.flow_path) == (video.num_frames - 1, 32, video.width) for video in Index.load(data_set))


def test_shards_of_records_and_the_run_that_makes_one_file_of_them(data_set, tmp_path):
    def refuse(pairs):
        raise AssertionError("computed again")

    out = tmp_path / "flow.lmdb"
    for number in (1, 0):
        write_flow(data_set, out, storage="lmdb", compute=smooth_flow, shard=(number, 2))
        held = [video.flow_path and split_record(video.flow_path)[0].name for video in Index.load(data_set)]
        shards = ["flow.0-of-2.lmdb", "flow.1-of-2.lmdb"] * 3
        assert held == ([None, "flow.1-of-2.lmdb"] * 3 if number else shards)[:5]
    report = write_flow(data_set, out, storage="lmdb", compute=refuse)
    assert (report["written"], report["kept"]) == (0, 5)
    assert {split_record(video.flow_path)[0].resolve() for video in Index.load(data_set)} == {out}
    before = out.stat()
    for file in tmp_path.glob("flow.*-of-2.lmdb"):
        file.unlink()
    assert write_flow(data_set, out, storage="lmdb", compute=refuse)["kept"] == 5
    assert out.stat() == before  # nothing to do: not even a copy


def test_a_record_that_was_missing_or_of_the_wrong_length_joins_the_finished_file(data_set, tmp_path):
    out = tmp_path / "flow.lmdb"
    videos = list(Index.load(data_set))
    content = videos[1].path.read_bytes()
    videos[1].path.write_bytes(b"")
    assert write_flow(data_set, out, storage="lmdb", compute=smooth_flow)["counts"] == {"broken": 1}
    videos[1].path.write_bytes(content)
    index = list(Index.load(data_set))
    Index([replace(index[0], num_frames=index[0].num_frames - 1), *index[1:]]).save(data_set)
    report = write_flow(data_set, out, storage="lmdb", compute=smooth_flow)
    assert (report["written"], report["kept"], report["problems"]) == (2, 3, [])
    assert all(frame_size(video.flow_path)[0] == video.num_frames - 1 for video in Index.load(data_set))


def test_two_videos_never_share_a_record(tmp_path):
    for split in ("train", "test"):
        write_video(tmp_path / split / "A" / "v.mkv", 3)
    write_video(tmp_path / "train" / "B" / "v.mkv", 3)
    build_index(tmp_path, out=tmp_path / "index.csv")
    write_flow(tmp_path / "index.csv", tmp_path / "flow.lmdb", storage="lmdb", compute=smooth_flow)
    names = {split_record(video.flow_path)[1] for video in Index.load(tmp_path / "index.csv")}
    assert names == {"train/A/v.mkv", "test/A/v.mkv", "B/v"}


def test_real_flow_op_from_video_to_file(tmp_path):
    """A texture that moves 2 pixels right and 1 up a frame, through the real op and back from the file."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (30, 34)).repeat(4, axis=0).repeat(4, axis=1)
    kernel = np.ones(5) / 5
    smooth = np.apply_along_axis(np.convolve, 0, np.apply_along_axis(np.convolve, 1, coarse, kernel, "same"), kernel,
                                 "same")  # fmt: skip
    path = tmp_path / "A" / "v.mp4"
    path.parent.mkdir()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "4"})
        stream.width, stream.height, stream.pix_fmt = 96, 80, "yuv420p"
        for i in range(4):
            image = smooth[10 + i : 90 + i, 20 - 2 * i : 116 - 2 * i].astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="gray")))
        container.mux(stream.encode(None))
    build_index(tmp_path, out=tmp_path / "index.csv")
    write_flow(tmp_path / "index.csv", tmp_path / "flow")
    flow = dequantise(torch.from_numpy(read_levels(Index.load(tmp_path / "index.csv")[0].flow_path, 96))).numpy()
    inside = flow[:, :, 16:-16, 16:-16]
    assert np.median(inside[:, 0]) == pytest.approx(2, abs=0.2)
    assert np.median(inside[:, 1]) == pytest.approx(-1, abs=0.2)
