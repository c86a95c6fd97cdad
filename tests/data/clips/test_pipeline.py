"""Batches hold the planned clips: right frames, right boxes, the same bits however they were made."""

import dataclasses
import logging
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from support.numbered_videos import decode_linearly, write_video

pytest.importorskip("nvidia.dali")

from cpr_fast.config import DataConfig
from cpr_fast.config.pixels import IMAGENET_MEAN as MEAN
from cpr_fast.config.pixels import IMAGENET_STD as STD
from cpr_fast.data.clips.background import run_ahead
from cpr_fast.data.clips.cut import cut_clips
from cpr_fast.data.clips.graph import ClipGraph
from cpr_fast.data.clips.loader import TrainLoader, WindowLoader, _route
from cpr_fast.data.clips.reader import ClipReader, fetch_cut, fetch_jpegs, fetch_packets
from cpr_fast.data.clips.sampling import (
    Clips,
    Sources,
    clip_frames,
    epoch_order,
    plan_labelled,
    plan_pairs,
    plan_windows,
)
from cpr_fast.data.clips.stream import ClipStream, Job
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.storage.record_writer import RecordWriter
from cpr_fast.data.storage.records import record_path, split_record
from cpr_fast.data.video.pixels import Region
from cpr_fast.errors import InputError

CPU = torch.device("cpu")
DATA = DataConfig(frames=4, size=32, batch_size=4, workers=2, prefetch=2)
SHAPES = [(48, 64), (60, 44), (72, 96), (50, 70)]  # height, width; several of them in one batch
LENGTHS = [12, 9, 17, 3, 11, 20, 14, 10, 8, 13]  # one is shorter than a clip


def texture(seed: int, height: int, width: int, num_frames: int) -> np.ndarray:
    """A smooth coloured picture that slides by two pixels a frame: uint8 [F, H, W, 3]."""
    noise = np.random.default_rng(seed).random((height, width + 2 * num_frames, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    return np.stack([(235 * smooth[:, 2 * t : 2 * t + width] + 10).astype(np.uint8) for t in range(num_frames)])


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    """Ten videos of four sizes. The flow of each is its own red channel (u) and its negative (v), one frame less."""
    folder = tmp_path_factory.mktemp("videos")
    videos = []
    for i, num_frames in enumerate(LENGTHS):
        height, width = SHAPES[i % len(SHAPES)]
        pictures = texture(i, height, width, num_frames)
        path = write_video(folder / f"v{i}", pictures, "mjpeg-avi" if i % 2 else "h264-bframes")
        red = pictures[:-1, ..., 0]
        flow = write_video(folder / f"v{i}_flow", np.concatenate([red, 255 - red], axis=1), "mjpeg-mkv")
        videos.append(Video(path, f"class{i % 3}", f"source{i // 2}", "train", num_frames, 25.0, width, height, flow))
    return Index(videos)


def collect(loader, epoch=0, start_step=0):
    with_loader = list(loader.epoch(epoch, start_step))
    loader.close()
    return with_loader


def levels(clip: torch.Tensor) -> np.ndarray:
    """A normalised clip [3, T, S, S] as 0..255 levels, float32 [T, S, S, 3]."""
    pixels = clip.permute(1, 2, 3, 0).numpy() * np.array(STD, np.float32) + np.array(MEAN, np.float32)
    return 255 * pixels


def resized(frames: np.ndarray, box: np.ndarray, flip: bool, size: int) -> np.ndarray:
    """PIL's crop and bicubic resize, uint8 [T, S, S, 3]."""
    top, left, bottom, right = (int(edge) for edge in box)
    out = []
    for frame in frames:
        picture = Image.fromarray(frame).crop((left, top, right, bottom)).resize((size, size), Image.BICUBIC)
        out.append(np.asarray(picture)[:, ::-1] if flip else np.asarray(picture))
    return np.stack(out)


def neutral(clips: Clips) -> np.ndarray:
    return (clips.brightness == 1) & (clips.saturation == 1) & (clips.hue == 0) & (clips.sigma == 0)


def assert_same_batches(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for view in a.clips:
            assert torch.equal(a.clips[view], b.clips[view])
        for name in ("video", "source", "label", "start"):
            assert torch.equal(getattr(a, name), getattr(b, name))


class TestBatches:
    def test_what_a_batch_is(self, index):
        loader = TrainLoader(index, DATA, ["rgb", "flow"], seed=0)
        assert len(loader) == 2
        batches = collect(loader)
        order = epoch_order(10, 0, 0)
        for step, batch in enumerate(batches):
            assert batch.video.tolist() == order[4 * step : 4 * step + 4].tolist()
            assert batch.label.tolist() == index.labels[batch.video].tolist()
            assert batch.source.tolist() == index.source_ids[batch.video].tolist()
            for view in ("rgb", "flow"):
                assert batch.clips[view].shape == (4, 2, 3, 4, 32, 32) and batch.clips[view].dtype == torch.float32
                for clip in (0, 1):
                    assert batch.clips[view][:, clip].is_contiguous(memory_format=torch.channels_last_3d)

    @pytest.mark.parametrize("augment", ["none", "coclr"])
    def test_frames_boxes_and_flips_are_the_planned_ones(self, index, augment):
        """Against a linear decode and PIL: frame identity, both views, padding; colour is left out here."""
        data = dataclasses.replace(DATA, augment=augment)
        checked = 0
        for batch in collect(TrainLoader(index, data, ["rgb", "flow"], seed=1), epoch=2):
            plan = plan_pairs(Sources.of(index), batch.video.numpy(), data, 1, 2)
            plain = neutral(plan)
            for row in range(8):
                video, (clip, place) = index[plan.video[row]], divmod(row, 4)
                assert batch.start[place, clip] == max(0, plan.start[row])
                frames = clip_frames(plan.start[row], data)
                flow = decode_linearly(video.flow_path)[frames, ..., 0]
                u, v = flow[:, : video.height], flow[:, video.height :]
                expected = np.stack([np.full_like(u, 128), v, u], axis=-1)
                got = levels(batch.clips["flow"][place, clip])
                assert (got[..., 0].round() == 128).all()
                assert np.abs(got - resized(expected, plan.box[row], plan.flip[row], 32)).max() <= 2.01
                if plain[row]:
                    rgb = resized(decode_linearly(video.path)[frames], plan.box[row], plan.flip[row], 32)
                    assert np.abs(levels(batch.clips["rgb"][place, clip]) - rgb).max() <= 2.01
                    checked += 1
        assert checked >= 6

    def test_another_plan_gives_its_clips(self, index):
        """One clip of a video, to learn its label: the frames, boxes and flips of `plan_labelled`."""
        checked = 0
        for batch in collect(TrainLoader(index, DATA, ["rgb"], seed=1, plan=plan_labelled)):
            assert batch.clips["rgb"].shape == (4, 1, 3, 4, 32, 32) and batch.start.shape == (4, 1)
            plan = plan_labelled(Sources.of(index), batch.video.numpy(), DATA, 1, 0)
            for row in np.nonzero(neutral(plan))[0]:
                frames = decode_linearly(index[plan.video[row]].path)[clip_frames(plan.start[row], DATA)]
                expected = resized(frames, plan.box[row], plan.flip[row], 32)
                assert np.abs(levels(batch.clips["rgb"][row, 0]) - expected).max() <= 1.01
                checked += 1
        assert checked >= 3

    def test_rgb_and_flow_share_the_draw(self, index):
        """The flow videos are the RGB videos' red channel: the clips must be the same picture."""
        checked = 0
        for batch in collect(TrainLoader(index, DATA, ["rgb", "flow"], seed=3)):
            plain = neutral(plan_pairs(Sources.of(index), batch.video.numpy(), DATA, 3, 0)).reshape(2, 4)
            for clip, place in zip(*np.nonzero(plain), strict=True):
                red = levels(batch.clips["rgb"][place, clip])[..., 0]
                _, v, u = np.moveaxis(levels(batch.clips["flow"][place, clip]), -1, 0)
                assert np.abs(red - u).mean() < 5 and np.corrcoef(red.ravel(), u.ravel())[0, 1] > 0.98
                assert np.abs(u + v - 255).mean() < 3
                checked += 1
        assert checked >= 6

    def test_one_view_alone_is_the_same_as_beside_the_other(self, index):
        both = collect(TrainLoader(index, DATA, ["rgb", "flow"], seed=0))
        for view in ("rgb", "flow"):
            for a, b in zip(both, collect(TrainLoader(index, DATA, [view], seed=0)), strict=True):
                assert torch.equal(a.clips[view], b.clips[view])

    def test_a_video_shorter_than_the_clip_repeats_frame_0_on_the_left(self, index):
        short = Index([index[3]])
        data = dataclasses.replace(DATA, batch_size=1, augment="none")
        batch = collect(TrainLoader(short, data, ["rgb"], seed=0))[0]
        assert batch.start.tolist() == [[0, 0]]
        clip = batch.clips["rgb"][0, 0]
        # 3 frames, of which 2 have flow: T = 4 shows 0 0 0 1
        assert torch.equal(clip[:, 0], clip[:, 1]) and torch.equal(clip[:, 0], clip[:, 2])
        assert not torch.equal(clip[:, 2], clip[:, 3])

    @pytest.mark.parametrize("kind", ["stride", "size"])
    def test_other_settings(self, index, kind):
        data = dataclasses.replace(DATA, **{"stride": {"stride": 2}, "size": {"size": 17, "frames": 1}}[kind])
        batch = collect(TrainLoader(index, data, ["rgb", "flow"], seed=0))[0]
        assert batch.clips["flow"].shape == (4, 2, 3, data.frames, data.size, data.size)
        assert torch.isfinite(batch.clips["rgb"]).all()


class TestSameBits:
    def test_threads_and_prefetch_change_nothing(self, index):
        reference = collect(TrainLoader(index, DATA, ["rgb", "flow"], seed=5), epoch=1)
        for workers, prefetch in ((1, 1), (5, 4)):
            data = dataclasses.replace(DATA, workers=workers, prefetch=prefetch)
            assert_same_batches(collect(TrainLoader(index, data, ["rgb", "flow"], seed=5), epoch=1), reference)

    def test_the_cache_changes_nothing(self, index):
        """Neither one that holds every video, nor one that fills up, nor the first reading after it."""
        plain = TrainLoader(index, dataclasses.replace(DATA, cache_gib=0), ["rgb", "flow"], seed=5)
        reference = [list(plain.epoch(epoch)) for epoch in (0, 1)]
        plain.close()
        for cache_gib in (1, 3e-4):
            loader = TrainLoader(index, dataclasses.replace(DATA, cache_gib=cache_gib), ["rgb", "flow"], seed=5)
            for epoch in (0, 1):
                assert_same_batches(list(loader.epoch(epoch)), reference[epoch])
            loader.close()

    def test_batch_size_and_rank_change_nothing(self, index):
        whole = collect(TrainLoader(index, DATA, ["rgb"], seed=5))
        for world_size in (2, 4):
            data = dataclasses.replace(DATA, batch_size=4 // world_size)
            ranks = [
                collect(TrainLoader(index, data, ["rgb"], seed=5, rank=rank, world_size=world_size))
                for rank in range(world_size)
            ]
            for step, batch in enumerate(whole):
                assert torch.equal(torch.cat([r[step].clips["rgb"] for r in ranks]), batch.clips["rgb"])
                assert torch.equal(torch.cat([r[step].start for r in ranks]), batch.start)
                assert torch.equal(torch.cat([r[step].video for r in ranks]), batch.video)

    def test_resumed_in_the_middle(self, index):
        data = dataclasses.replace(DATA, batch_size=2)
        loader = TrainLoader(index, data, ["rgb", "flow"], seed=0)
        whole = list(loader.epoch(4))
        assert len(whole) == 5
        assert_same_batches(list(loader.epoch(4, start_step=3)), whole[3:])
        assert list(loader.epoch(4, start_step=5)) == []
        loader.close()

    def test_epochs_differ_and_old_batches_stay_as_they_were(self, index):
        loader = TrainLoader(index, DATA, ["rgb"], seed=0)
        kept = list(loader.epoch(0))
        copies = [batch.clips["rgb"].clone() for batch in kept]
        other = list(loader.epoch(1))
        assert not torch.equal(other[0].clips["rgb"], copies[0])
        assert all(torch.equal(batch.clips["rgb"], copy) for batch, copy in zip(kept, copies, strict=True))
        assert_same_batches(list(loader.epoch(0)), kept)
        loader.close()


def cut_whole(frames: np.ndarray, clips: Clips, view: str) -> list[np.ndarray]:
    """The clips, of DATA's frames, of a video of the given ones."""
    region = Region.whole(*frames.shape[1:3])
    return cut_clips([frames], clips, view, DATA, region, finish=True)


class TestAugmentation:
    """One clip at a time through the graph, against NumPy, PIL and OpenCV. Tolerances are in levels of 255."""

    def run(self, pixels, **draw):
        neutral_draw = {"flip": False, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0, "sigma": 0, "crop": 0}
        box = draw.pop("box", [0, 0, *pixels.shape[1:3]])
        rest = {name: np.array([value]) for name, value in (neutral_draw | draw).items()}
        clips = Clips(np.zeros(1, int), np.zeros(1, int), np.array([box]), **rest)
        graph = ClipGraph(DATA, {"rgb": "frames"}, CPU, 1)
        return levels(graph.run(clips, {"rgb": cut_whole(pixels, clips, "rgb")})["rgb"][0])

    @pytest.mark.parametrize("box", [[0, 0, 60, 80], [3, 5, 23, 65], [10, 0, 60, 41], [30, 30, 41, 39]])
    @pytest.mark.parametrize("flip", [False, True])
    def test_crop_resize_flip(self, box, flip):
        pixels = texture(0, 60, 80, 4)
        assert np.abs(self.run(pixels, box=box, flip=flip) - resized(pixels, box, flip, 32)).max() <= 2.01

    @pytest.mark.parametrize(
        ("name", "value"),
        [("brightness", 0.6), ("brightness", 1.4), ("contrast", 0.7), ("contrast", 1.3), ("saturation", 0.0),
         ("saturation", 1.4)],
    )  # fmt: skip
    def test_colour(self, name, value):
        pixels = texture(1, 32, 32, 4)
        x = pixels.astype(np.float64)
        pivot = {"brightness": 0, "contrast": 128, "saturation": (x @ [0.299, 0.587, 0.114])[..., None]}[name]
        expected = np.clip(pivot + value * (x - pivot), 0, 255)
        assert np.abs(self.run(pixels, **{name: value}) - expected).max() <= 2

    def test_hue_turns_the_colours_and_keeps_the_luma(self):
        pixels = (texture(2, 32, 32, 4) // 2 + 64).astype(np.uint8)  # far from clipping
        luma = np.array([0.299, 0.587, 0.114])
        for degrees in (-36.0, 20.0):
            got = self.run(pixels, hue=degrees)
            assert np.abs(got @ luma - pixels @ luma).max() <= 2
            assert np.abs(got - pixels).max() > 5
        half_turn_twice = self.run(np.rint(self.run(pixels, hue=36.0)).astype(np.uint8), hue=-36.0)
        assert np.abs(half_turn_twice - pixels).max() <= 3

    @pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
    def test_blur(self, sigma):
        pixels = texture(3, 32, 32, 4)
        side = 2 * int(np.ceil(3 * sigma)) + 1
        expected = [cv2.GaussianBlur(f, (side, side), sigma, borderType=cv2.BORDER_REFLECT_101) for f in pixels]
        assert np.abs(self.run(pixels, sigma=sigma) - np.stack(expected)).max() <= 2

    def test_normalisation(self):
        graph = ClipGraph(DATA, {"rgb": "frames", "flow": "frames"}, CPU, 1)
        clips = plan_windows(Sources(np.array([4]), np.array([32]), np.array([32])), 0, DATA, None)
        frames = {"rgb": np.full((4, 32, 32, 3), 51, np.uint8), "flow": np.full((4, 32, 32, 2), [204, 102], np.uint8)}
        out = graph.run(clips, {view: cut_whole(pixels, clips, view) for view, pixels in frames.items()})
        for view, value in {"rgb": (51, 51, 51), "flow": (128, 102, 204)}.items():
            expected = [(v / 255 - m) / s for v, m, s in zip(value, MEAN, STD, strict=True)]
            torch.testing.assert_close(out[view].mean(dim=(0, 2, 3, 4)), torch.tensor(expected), rtol=0, atol=1e-5)


def other_route(folder: Path, kind: str, route: str) -> tuple[Video, Index]:
    """A video of 30 frames and its flow, as files that DALI decodes on the CPU or as JPEG records."""
    pictures = texture(0, 48, 64, 30)
    red = pictures[:-1, ..., 0]
    if route == "packets":
        path = write_video(folder / "rgb", pictures, kind)
        flow = write_video(folder / "flow", np.concatenate([red, 255 - red], axis=1), "mjpeg-mkv")
    else:
        path, flow = record_path(folder / "rgb.lmdb", "a/b"), record_path(folder / "flow.lmdb", "a/b")
        bgr = np.stack([red, 255 - red, np.full_like(red, 128)], axis=-1)  # (u, v, 128)
        for target, frames in ((path, pictures[..., ::-1]), (flow, bgr)):
            with RecordWriter(split_record(target)[0]) as writer:
                writer.put(
                    "a/b", [cv2.imencode(".jpg", f, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes() for f in frames]
                )
    video = Video(path, "a", "a", "train", 30, 25.0, 64, 48, flow)
    return video, Index([video])


@pytest.mark.parametrize(("kind", "route"), [("vp9", "packets"), ("mjpeg-mkv", "packets"), ("jpeg", "jpegs")])
@pytest.mark.parametrize(
    ("group", "same_frames", "clip_major"), [(1, False, False), (2, False, True), (3, True, False)]
)
def test_the_other_routes_give_the_frames_of_the_frame_graph(tmp_path, kind, route, group, same_frames, clip_major):
    """DALI's own decoders, on what they have on the CPU: every frame the same up to resize and colour conversion.
    Starts overlap, repeat, run backwards and pad; a group is one video's."""
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
                another = np.abs(np.roll(levels(a), 1, axis=0) - levels(b)).mean()  # what a wrong frame differs by
                limit = 2 if view == "rgb" and route == "packets" else 0.5  # torch's resize beside DALI's
                assert difference < limit and another > 1.5, (view, difference, another)


@pytest.mark.parametrize("route", ["packets", "jpegs"])
def test_loaders_by_the_other_routes(tmp_path, monkeypatch, route):
    """What a GPU does, with DALI's CPU decoders: training pairs and ten crops, both views."""
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
                difference = 58 * (a.clips[view] - b.clips[view]).abs().mean()  # levels
                assert difference < (3 if view == "rgb" and route == "packets" else 0.5)


@pytest.mark.parametrize("kind", ["h264-bframes", "h264-open-gop", "mpeg4-avi", "vp9", "mjpeg-avi", "jpeg"])
def test_loaders_on_a_device_give_the_clips_of_the_cpu(tmp_path, device, kind):
    """NVDEC and nvJPEG where there is a GPU: training pairs and ten crops, frame by frame those of PyAV."""
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
    with pytest.raises(InputError, match="expected the rgb of all videos in files or of all in LMDB.*lmdb#a/b"):
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


class TestIIC:
    """IIC's clips against its own recipe: PIL's bilinear resize to 128x171, a crop of 112, x / 255; its residual."""

    DATA = dataclasses.replace(DATA, augment="iic", size=112)

    def expected(self, frames: np.ndarray, row: int, column: int) -> np.ndarray:
        resized = [np.asarray(Image.fromarray(frame).resize((171, 128), Image.BILINEAR)) for frame in frames]
        return np.stack(resized)[:, row : row + 112, column : column + 112]

    def test_training_clips_and_residuals(self, index):
        corners = set()
        for batch in collect(TrainLoader(index, self.DATA, ["residual", "rgb"], seed=0)):
            plan = plan_pairs(Sources.of(index), batch.video.numpy(), self.DATA, 0, 0)
            for row in range(8):
                video, (clip, place) = index[plan.video[row]], divmod(row, 4)
                corner = plan.box[row, :2] * [128, 171] / [video.height, video.width]
                np.testing.assert_allclose(corner, corner.round(), atol=1e-9)
                corners.add(tuple(corner.round().astype(int)))
                frames = decode_linearly(video.path)[clip_frames(plan.start[row], self.DATA)]
                rgb = batch.clips["rgb"][place, clip].permute(1, 2, 3, 0).numpy()
                want = self.expected(frames, *corner.round().astype(int)) / 255
                assert np.abs(rgb - want).max() <= 2.01 / 255 and np.abs(rgb - want).mean() < 0.6 / 255
                moved = batch.clips["residual"][place, clip].permute(1, 2, 3, 0).numpy()
                np.testing.assert_allclose(moved, (rgb - np.roll(rgb, 1, axis=0) + 1) / 2, atol=1e-6)
        assert len(corners) > 12 and not plan.flip.any() and neutral(plan).all()

    def test_windows_are_the_centre_crop(self, index):
        loader = WindowLoader(index, self.DATA, ["rgb"], clips_per_video=1)
        clip = next(iter(loader)).clips["rgb"][0].permute(1, 2, 3, 0).numpy()
        loader.close()
        want = self.expected(decode_linearly(index[0].path)[:4], 8, 30) / 255
        assert np.abs(clip - want).max() <= 2.01 / 255

    def test_the_residual_of_normalised_clips(self, index):
        data = dataclasses.replace(DATA, augment="none")
        batch = collect(TrainLoader(index, data, ["rgb", "residual"], seed=0))[0]
        pixels, moved = (levels(batch.clips[view][0, 0]) / 255 for view in ("rgb", "residual"))
        np.testing.assert_allclose(moved, (pixels - np.roll(pixels, 1, axis=0) + 1) / 2, atol=1e-6)
        alone = collect(TrainLoader(index, data, ["residual"], seed=0))[0]
        assert list(alone.clips) == ["residual"] and torch.equal(alone.clips["residual"], batch.clips["residual"])

    def test_a_view_that_does_not_exist(self, index):
        with pytest.raises(InputError, match="views: expected some of rgb, flow, residual, got depth"):
            TrainLoader(index, DATA, ["rgb", "depth"], seed=0)


class TestExact:
    """`data.exact`: torchvision's recipe on PIL, bit for bit; and how far DALI is from it."""

    @pytest.mark.parametrize("augment", ["coclr", "iic", "none"])
    def test_clips_are_the_reference_and_dalis_are_near(self, index, augment):
        data = dataclasses.replace(DATA, augment=augment, exact=True)
        exact = collect(TrainLoader(index, data, ["rgb", "flow", "residual"], seed=1), epoch=2)
        dali = collect(
            TrainLoader(index, dataclasses.replace(data, exact=False), ["rgb", "flow", "residual"], seed=1), 2
        )
        for a, b in zip(exact, dali, strict=True):
            plain = torch.from_numpy(
                neutral(plan_pairs(Sources.of(index), a.video.numpy(), data, 1, 2)).reshape(2, 4)
            ).T
            for view in a.clips:
                assert a.clips[view].shape == b.clips[view].shape
                assert a.clips[view][:, 1].is_contiguous(memory_format=torch.channels_last_3d)
                assert 58 * (a.clips[view] - b.clips[view])[plain].abs().mean() < 2  # levels
            assert torch.equal(a.start, b.start) and torch.equal(a.label, b.label)

    def test_windows_equal_torchvisions_recipe_bit_for_bit(self, index):
        data = dataclasses.replace(DATA, exact=True)
        loader = WindowLoader(index, data, ["rgb"], clips_per_video=2, crops=10)
        clips = torch.cat([batch.clips["rgb"] for batch in loader])
        loader.close()
        plan = Clips.concatenate([plan_windows(Sources.of(index), v, data, 2, 10) for v in range(len(index))])
        for row in (0, 7, 19, 33, 60):
            frames = decode_linearly(index[plan.video[row]].path)[clip_frames(plan.start[row], data)]
            top, left, bottom, right = plan.box[row].tolist()
            crops = [Image.fromarray(frame).crop((left, top, right, bottom)) for frame in frames]
            resized = [np.asarray(crop.resize((32, 32), Image.BICUBIC)) for crop in crops]
            pixels = torch.from_numpy(np.stack(resized)).permute(3, 0, 1, 2).float().div(255)  # ToTensor
            expected = (pixels - torch.tensor(MEAN).view(3, 1, 1, 1)) / torch.tensor(STD).view(3, 1, 1, 1)
            expected = expected.flip(-1) if plan.flip[row] else expected
            assert torch.equal(clips[row], expected)


class TestBadFiles:
    @pytest.fixture
    def damaged(self, index, tmp_path) -> Index:
        """As `index`, with one text file, one missing flow file and one video shorter than the index says."""
        videos = list(index)
        (tmp_path / "text.mp4").write_text("not a video " * 100)
        videos[2] = dataclasses.replace(videos[2], path=tmp_path / "text.mp4")
        videos[5] = dataclasses.replace(videos[5], flow_path=tmp_path / "none.mp4")
        videos[8] = dataclasses.replace(videos[8], num_frames=500)
        return Index(videos)

    def test_substituted_counted_named_once(self, damaged, caplog):
        loader = TrainLoader(damaged, DATA, ["rgb", "flow"], seed=0)
        with caplog.at_level(logging.WARNING):
            batches = [batch for epoch in range(4) for batch in loader.epoch(epoch)]
        loader.close()
        assert all(len(batch.video) == 4 for batch in batches)
        assert not {2, 5} & {video for batch in batches for video in batch.video.tolist()}
        names = [str(path) for path, _ in loader.skipped]
        assert len(names) == len(set(names)) <= 3
        assert any("text.mp4" in n for n in names) and any("none.mp4" in n for n in names)
        assert all(sum(name in r.getMessage() for r in caplog.records) == 1 for name in names)

    @pytest.mark.parametrize("cache_gib", [0.0, 1.0])
    def test_the_substitute_depends_on_the_files_alone(self, damaged, cache_gib):
        reference = collect(TrainLoader(damaged, DATA, ["rgb", "flow"], seed=0), epoch=1)
        data = dataclasses.replace(DATA, workers=1, prefetch=1, cache_gib=cache_gib)
        fresh = TrainLoader(damaged, data, ["rgb", "flow"], seed=0)
        list(fresh.epoch(0))
        assert_same_batches(collect(fresh, epoch=1), reference)
        resumed = collect(TrainLoader(damaged, DATA, ["rgb", "flow"], seed=0), epoch=1, start_step=1)
        assert_same_batches(resumed, reference[1:])

    def test_all_bad(self, index, tmp_path):
        videos = [dataclasses.replace(v, path=tmp_path / f"none{i}.avi") for i, v in enumerate(index)]
        loader = TrainLoader(Index(videos), DATA, ["rgb"], seed=0)
        with pytest.raises(InputError, match=r"none of the 10 videos.*none\d\.avi.*No such file"):
            next(loader.epoch(0))
        loader.close()

    def test_a_batch_the_graph_fails_on_is_read_again_with_every_video_checked(self, index, tmp_path):
        """What the hardware decoder needs: it fails on a whole batch and names nobody."""

        (tmp_path / "text.mp4").write_text("not a video " * 100)
        bad = dataclasses.replace(index[1], path=tmp_path / "text.mp4")
        videos = Index([index[0], bad, index[2]])

        class Graph:
            def rows(self, clips):
                return np.arange(clips)

            def run(self, clips, samples):
                if bad in samples["rgb"]:
                    raise RuntimeError("decoder error")
                return samples

        plans = [plan_pairs(Sources.of(videos), np.array([video]), DATA, 0, 0) for video in range(3)]
        jobs = [Job(plans[0]), Job(plans[1], lambda: iter([plans[1], plans[2]]))]
        reader = ClipReader(videos, DATA, {"rgb": lambda video, clips, view, data: [video]})
        stream = ClipStream(reader, Graph(), workers=1, prefetch=1, check=True)
        batches = list(stream.stream([jobs], lambda materials: stream.run(materials)[0].video))
        stream.close()
        assert [batch.tolist() for batch in batches] == [[0, 0, 2, 2]]
        assert reader.skipped == [(bad.path, "Invalid data found when processing input")]

    def test_a_size_other_than_the_index_says(self, index):
        videos = [dataclasses.replace(index[0], width=99), index[1]]
        loader = TrainLoader(Index(videos), dataclasses.replace(DATA, batch_size=2), ["rgb"], seed=0)
        assert [batch.video.tolist() for batch in loader.epoch(0)] == [[1, 1]]
        assert "64x48, the index says 99x48" in loader.skipped[0][1]
        loader.close()

    def test_too_few_videos(self, index):
        with pytest.raises(InputError, match="holds 10 videos.*data.batch_size 4 x 3 ranks"):
            TrainLoader(index, DATA, ["rgb"], seed=0, world_size=3)

    def test_flow_asked_for_but_not_there(self, index):
        videos = [*list(index)[:9], dataclasses.replace(index[9], flow_path=None)]
        for loader in (TrainLoader, WindowLoader):
            options = {"seed": 0} if loader is TrainLoader else {}
            with pytest.raises(InputError, match=f"{Path(index[9].path).name}.*no flow_path"):
                loader(Index(videos), DATA, ["rgb", "flow"], **options)

    def test_windows_that_cannot_be_read_are_the_only_ones_missing(self, damaged):
        loader = WindowLoader(damaged, DATA, ["rgb", "flow"], batch_size=3)
        seen = {video for batch in loader for video in batch.video.tolist()}
        assert seen == {0, 1, 3, 4, 6, 7, 8, 9}  # 8 gives the windows that decode
        assert len(loader.skipped) == 3
        loader.close()


class TestWindowLoader:
    @pytest.mark.parametrize("batch_size", [1, 7, 64])
    def test_every_window_of_every_video_once(self, index, batch_size):
        loader = WindowLoader(index, DATA, ["rgb", "flow"], batch_size=batch_size)
        batches = list(loader)
        expected = [plan_windows(Sources.of(index), video, DATA, None) for video in range(len(index))]
        videos = np.concatenate([plan.video for plan in expected])
        assert torch.cat([batch.video for batch in batches]).tolist() == videos.tolist()
        assert len(batches) == len(loader) and set(videos) == set(range(10))
        clips = torch.cat([batch.clips["rgb"] for batch in batches])
        assert batches[0].clips["flow"].is_contiguous(memory_format=torch.channels_last_3d)
        for plan, clip in zip(Clips.concatenate(expected)[np.arange(len(videos))].video, clips, strict=True):
            assert clip.shape == (3, 4, 32, 32) and index[plan] is not None
        row = int(np.flatnonzero(videos == 5)[3])
        frames = decode_linearly(index[5].path)[clip_frames(expected[5].start[3], DATA)]
        assert np.abs(levels(clips[row]) - resized(frames, expected[5].box[3], False, 32)).max() <= 2.01
        loader.close()

    def test_uniform_windows_and_repeated_passes(self, index):
        loader = WindowLoader(index, DATA, ["rgb"], clips_per_video=3)
        first, second = list(loader), list(loader)
        assert sum(len(batch.video) for batch in first) == 3 * 9 + 1  # the short video has one
        assert all(torch.equal(a.clips["rgb"], b.clips["rgb"]) for a, b in zip(first, second, strict=True))
        loader.close()

    def test_ten_crops_of_every_window_in_one_pass(self, index):
        loader = WindowLoader(index, DATA, ["rgb"], clips_per_video=2, crops=10, batch_size=7)
        batches = list(loader)
        loader.close()
        plan = Clips.concatenate([plan_windows(Sources.of(index), video, DATA, 2, 10) for video in range(len(index))])
        assert torch.cat([batch.crop for batch in batches]).tolist() == plan.crop.tolist()
        clips = torch.cat([batch.clips["rgb"] for batch in batches])
        for row in range(10):
            frames = decode_linearly(index[0].path)[clip_frames(plan.start[row], DATA)]
            assert np.abs(levels(clips[row]) - resized(frames, plan.box[row], plan.flip[row], 32)).max() <= 2.01


class TestEnd:
    def loader_threads(self):
        return [t for t in threading.enumerate() if t.name.startswith("cpr-fast")]

    def test_no_thread_is_left_after_an_epoch_was_abandoned(self, index):
        data = dataclasses.replace(DATA, batch_size=1, prefetch=3)
        loader = TrainLoader(index, data, ["rgb"], seed=0)
        for _ in loader.epoch(0):
            break
        batches = loader.epoch(1)
        next(batches)
        with pytest.raises(KeyboardInterrupt):
            batches.throw(KeyboardInterrupt)
        assert len(list(loader.epoch(2))) == 10  # and it still works
        loader.close()
        loader.close()
        assert self.loader_threads() == []

    def test_an_epoch_never_started_costs_nothing(self, index):
        loader = TrainLoader(index, DATA, ["rgb"], seed=0)
        loader.epoch(0)
        assert self.loader_threads() == []
        loader.close()

    def test_errors_behind_are_raised_in_front(self):
        closed = threading.Event()

        def items():
            try:
                yield 1
                raise ValueError("behind")
            finally:
                closed.set()

        ahead = run_ahead(items(), depth=1)
        assert next(ahead) == 1
        with pytest.raises(ValueError, match="behind"):
            next(ahead)
        assert closed.is_set() and self.loader_threads() == []
