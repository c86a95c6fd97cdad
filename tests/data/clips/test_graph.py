"""The DALI graphs: augmentation against NumPy, PIL and OpenCV, and equal clips for every route."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.data_sets.clips import CPU, DATA, MEAN, STD, levels, other_route, resized, texture
from support.numbered_videos import clips_at, write_video

pytest.importorskip("nvidia.dali", reason="the loaders need NVIDIA DALI")

from cpr_fast.data.clips.cut import cut_clips
from cpr_fast.data.clips.graph import ClipGraph
from cpr_fast.data.clips.loader import TrainLoader, WindowLoader, _route
from cpr_fast.data.clips.reader import fetch_cut, fetch_jpegs, fetch_packets
from cpr_fast.data.clips.sampling import Clips, Sources, plan_windows
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.video.pixels import Region
from cpr_fast.errors import InputError


def cut_whole(frames: np.ndarray, clips: Clips, view: str) -> list[np.ndarray]:
    """Returns the planned clips, with the number of frames set in DATA, of one of the given videos."""
    region = Region.whole(*frames.shape[1:3])
    return cut_clips([frames], clips, view, DATA, region, finish=True)


class TestAugmentation:
    """Compares clips from the graph, one at a time, with NumPy, PIL and OpenCV. Tolerances are in levels of 255."""

    def run(self, pixels, **draw):
        clips = clips_at(SimpleNamespace(height=pixels.shape[1], width=pixels.shape[2]), [0], **draw)
        graph = ClipGraph(DATA, {"rgb": "frames"}, CPU, 1)
        return levels(graph.run(clips, {"rgb": cut_whole(pixels, clips, "rgb")})["rgb"][0])

    @pytest.mark.parametrize("box", [[0, 0, 60, 80], [3, 5, 23, 65], [10, 0, 60, 41], [30, 30, 41, 39]])
    @pytest.mark.parametrize("flip", [False, True])
    def test_crop_resize_flip(self, box, flip):
        pixels = texture(0, 60, 80, 4)
        assert np.abs(self.run(pixels, box=box, flip=flip) - resized(pixels, box, flip, 32)).max() <= 2.01

    def test_normalisation(self):
        graph = ClipGraph(DATA, {"rgb": "frames", "flow": "frames"}, CPU, 1)
        clips = plan_windows(Sources(np.array([4]), np.array([32]), np.array([32])), 0, DATA, None)
        frames = {"rgb": np.full((4, 32, 32, 3), 51, np.uint8), "flow": np.full((4, 32, 32, 2), [204, 102], np.uint8)}
        out = graph.run(clips, {view: cut_whole(pixels, clips, view) for view, pixels in frames.items()})
        for view, value in {"rgb": (51, 51, 51), "flow": (128, 102, 204)}.items():
            expected = [(v / 255 - m) / s for v, m, s in zip(value, MEAN, STD, strict=True)]
            torch.testing.assert_close(out[view].mean(dim=(0, 2, 3, 4)), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "route"), [("vp9", "packets"), ("mjpeg-mkv", "packets"), ("jpeg", "jpegs")])
@pytest.mark.parametrize(
    ("group", "same_frames", "clip_major"), [(1, False, False), (2, False, True), (3, True, False)]
)
def test_the_other_routes_give_the_frames_of_the_frame_graph(tmp_path, kind, route, group, same_frames, clip_major):
    """DALI's decoders, for the codecs that they support on the CPU: frames are equal except for resize and colour
    conversion. Starts overlap, repeat, decrease and need padding; the clips of a group are of one video.
    """
    video, _ = other_route(tmp_path, kind, route)
    start = np.array([0, 9, 13, 25, 12, 12, -2, 3, 20, 2, 7, 7])
    start = start.repeat(3) if same_frames else start
    clips = Clips.concatenate([plan_windows(Sources(*np.array([[30], [48], [64]])), 0, DATA, 1, 10)] * 4)[: len(start)]
    clips = dataclasses.replace(clips, start=start)
    options = {"group": group, "same_frames": same_frames, "clip_major": clip_major}
    views = ("rgb", "flow")
    frames = {view: fetch_cut(video, clips, view, DATA) for view in views}
    expected = ClipGraph(DATA, dict.fromkeys(views, "frames"), CPU, len(start), **options)
    other = ClipGraph(DATA, dict.fromkeys(views, route), CPU, len(start), **options)
    for repeat in (len(start), len(start) // 2):  # the second run is smaller
        few = {view: frames[view][:repeat] for view in views}
        if route == "jpegs":
            samples = {view: fetch_jpegs(video, clips[:repeat], view, DATA) for view in views}
        else:
            samples = {view: fetch_packets(video, clips[:repeat], view, DATA, group=group) for view in views}
        want, got = expected.run(clips[:repeat], few), other.run(clips[:repeat], samples)
        np.testing.assert_array_equal(other.rows(repeat), expected.rows(repeat))
        for view in views:
            for a, b in zip(got[view], want[view], strict=True):
                difference = np.abs(levels(a) - levels(b)).mean()
                another = np.abs(
                    np.roll(levels(a), 1, axis=0) - levels(b)
                ).mean()  # difference that a wrong frame would cause
                limit = 2 if view == "rgb" and route == "packets" else 0.5  # torch's resize compared with DALI's
                assert difference < limit and another > 1.5, (view, difference, another)


@pytest.mark.parametrize("route", ["packets", "jpegs"])
def test_loaders_by_the_other_routes(tmp_path, monkeypatch, route):
    """Runs the graph of the GPU route with DALI's CPU decoders: training pairs and ten crops, both views."""
    _, index = other_route(tmp_path, "vp9", route)
    data = dataclasses.replace(DATA, batch_size=1)
    made = {}
    for chosen in ("frames", route):
        monkeypatch.setattr("cpr_fast.data.clips.loader._route", lambda *_, chosen=chosen: chosen)
        train = TrainLoader(index, data, ["rgb", "flow"], seed=2)
        windows = WindowLoader(index, data, ["rgb", "flow"], clips_per_video=3, crops=10, batch_size=20)
        made[chosen] = [batch for epoch in range(4) for batch in train.epoch(epoch)], list(windows)
        train.close()
        windows.close()
    for expected, got in zip(made["frames"], made[route], strict=True):
        assert len(expected) == len(got)
        for a, b in zip(expected, got, strict=True):
            for view in ("rgb", "flow"):
                assert a.clips[view].shape == b.clips[view].shape
                difference = 58 * (a.clips[view] - b.clips[view]).abs().mean()  # levels; OpenCV's hue and torch's
                assert difference < (3 if view == "rgb" and route == "packets" else 1)


@pytest.mark.parametrize("kind", ["h264-bframes", "h264-open-gop", "mpeg4-avi", "vp9", "mjpeg-avi", "jpeg"])
def test_loaders_on_a_device_give_the_clips_of_the_cpu(tmp_path, device, kind):
    """On a GPU, NVDEC and nvJPEG give the frames that PyAV gives, for training pairs and for ten crops."""
    route = "jpegs" if kind == "jpeg" else "packets"
    _, index = other_route(tmp_path, kind, route)
    views = ["rgb", "flow", "residual"] if kind in ("jpeg", "vp9") else ["rgb"]
    data = dataclasses.replace(DATA, batch_size=1)
    for augment in ("none", "coclr"):
        settings = dataclasses.replace(data, augment=augment)
        batches = []
        for where in (CPU, device):
            train = TrainLoader(index, settings, views, seed=2, device=where)
            windows = WindowLoader(index, settings, views, clips_per_video=3, crops=10, batch_size=20, device=where)
            batches.append([batch for epoch in range(4) for batch in train.epoch(epoch)] + list(windows))
            train.close()
            windows.close()
        for a, b in zip(*batches, strict=True):
            for view in views:
                assert b.clips[view].device.type == device.type
                difference = 58 * (a.clips[view] - b.clips[view].cpu()).abs().mean()  # levels
                assert difference < (4 if view == "rgb" else 2), (augment, view)


def test_files_and_records_together_need_the_cpu(tmp_path):
    (tmp_path / "a").mkdir()
    video, _ = other_route(tmp_path, "vp9", "packets")
    record, _ = other_route(tmp_path, "jpeg", "jpegs")
    mixed = Index([video, dataclasses.replace(record, width=64)])
    with pytest.raises(InputError, match="expected the rgb of all videos in files, of all in LMDB records, .*lmdb#a/b"):
        _route(mixed, "rgb", torch.device("cuda"))
    assert _route(Index([record]), "flow", torch.device("cuda")) == "jpegs"
    assert _route(Index([video]), "flow", torch.device("cuda")) == "packets"
    loader = TrainLoader(mixed, dataclasses.replace(DATA, batch_size=2), ["rgb", "flow"], seed=0)
    assert next(loader.epoch(0)).clips["flow"].shape == (2, 2, 3, 4, 32, 32)
    loader.close()


def test_the_packet_graph_still_works_after_packets_that_do_not_decode(tmp_path):
    path = write_video(tmp_path / "rgb", texture(0, 48, 64, 30), "vp9")
    video = Video(path, "a", "a", "train", 30, 25.0, 64, 48, None)
    clips = plan_windows(Sources(np.array([30]), np.array([48]), np.array([64])), 0, DATA, 2)
    packets = fetch_packets(video, clips, "rgb", DATA)
    graph = ClipGraph(DATA, {"rgb": "packets"}, CPU, 2)
    before = graph.run(clips, {"rgb": packets})["rgb"]
    for damaged in (np.frombuffer(b"garbage" * 100, np.uint8), packets[1][0][:300]):
        with pytest.raises(RuntimeError):
            graph.run(clips, {"rgb": [packets[0], (damaged, *packets[1][1:])]})
        assert torch.equal(graph.run(clips, {"rgb": packets})["rgb"], before)
