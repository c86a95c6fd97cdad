"""Flow files contain the computed flow, in a format that every decoder reads."""

import av
import numpy as np
import pytest
import torch
from support.data_sets.flow import gray_frames, in_pairs, read_levels, smooth_flow, write_video
from support.numbered_videos import clips_at

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.reader import fetch_frames
from cpr_fast.data.flow.levels import dequantise
from cpr_fast.data.flow.write import write_flow
from cpr_fast.data.index.build import build_index
from cpr_fast.data.index.index import Index


def test_flow_files_hold_what_was_computed(data_set, tmp_path):
    report = write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    assert report.pop("pairs_per_s") > 0 and report.pop("elapsed_s") >= 0
    pairs = sum(video.num_frames - 1 for video in Index.load(data_set))
    assert report == {"index": str(data_set), "videos": 5, "written": 5, "kept": 0, "pairs": pairs, "without_flow": 0,
                      "counts": {}, "problems": []}  # fmt: skip
    index = Index.load(data_set)
    for video in index:
        expected = smooth_flow(in_pairs(gray_frames(video.path))).numpy()
        stored = read_levels(video.flow_path, video.width)
        assert stored.shape == expected.shape == (video.num_frames - 1, 2, video.height, video.width)
        error = dequantise(torch.from_numpy(stored)).numpy() - np.clip(expected, -20, 20)
        assert np.sqrt(np.mean(error**2)) < 0.07 and np.abs(error).max() < 0.5
    assert not list(tmp_path.rglob(".*"))


def test_flow_files_are_what_hardware_decoders_take(data_set, tmp_path):
    write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    for video in Index.load(data_set):
        with av.open(str(video.flow_path)) as container:
            stream = container.streams.video[0]
            frames = list(container.decode(stream))
            assert stream.codec_context.name == "h264" and stream.codec_context.profile in ("High", "Main")
        assert {frame.format.name for frame in frames} <= {"yuv420p", "yuvj420p"}
        assert all(frame.color_range == 2 for frame in frames)  # full range: 0 and 255 are black and white
        chroma = frames[-1].to_ndarray(format="yuv420p")[frames[-1].height :]
        assert frames[0].key_frame and np.abs(chroma.astype(int) - 128).max() <= 1


def test_the_loader_reads_them_and_an_odd_width_too(data_set, tmp_path):
    write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    for video in Index.load(data_set):
        if video.num_frames < 5:
            continue
        clip = fetch_frames(video, clips_at(video, [1]), "flow", DataConfig(frames=3, size=16))[0]
        expected = read_levels(video.flow_path, video.width)[1:4].transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(clip, expected)


def test_videos_outside_the_folder_of_the_index(tmp_path):
    write_video(tmp_path / "videos" / "A" / "v.mkv", 3)
    build_index(tmp_path / "videos", out=tmp_path / "lists" / "deep" / "index.csv")
    write_flow(tmp_path / "lists" / "deep" / "index.csv", tmp_path / "flow", compute=smooth_flow)
    video = Index.load(tmp_path / "lists" / "deep" / "index.csv")[0]
    assert video.flow_path.resolve() == (tmp_path / "flow" / "videos" / "A" / "v.flow.mp4").resolve()


def test_real_flow_op_from_video_to_file(tmp_path):
    """A texture moves 2 pixels right and 1 up per frame; its flow is computed by the real operator and read from the
    file.
    """
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
