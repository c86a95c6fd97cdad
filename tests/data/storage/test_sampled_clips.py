"""Clips with `data.fps`: the frames of a linear decode at evenly spaced times, by every route, in plans and loaders."""

import io
from dataclasses import replace
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
import torch
from support.data_sets.clips import DATA
from support.numbered_videos import numbered_picture, numbers_shown, write_video
from support.videos.timed_videos import mixed_times, places_at, shown_by_linear_decode, write_timed

from cpr_fast.config import DataConfig
from cpr_fast.config.load import load
from cpr_fast.data.clips.reader import FrameCache, fetch_frames, fetch_jpegs, fetch_packets
from cpr_fast.data.clips.sampling import Clips, Sources, plan_pairs, plan_windows
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.storage.record_writer import RecordWriter
from cpr_fast.data.storage.records import record_path
from cpr_fast.data.video import probe_video
from cpr_fast.errors import InputError

COUNTS, FPS = (41, 23, 9, 60, 3, 35, 28, 50), 10.0  # frames of the videos; 3 frames are shorter than a clip
LATE = Fraction(1, 2000)
TIMED = replace(DATA, fps=FPS, stride=2, flow_colour=False)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    """Videos of variable rates and their flow, whose field n shows n."""
    folder, videos = tmp_path_factory.mktemp("timed"), []
    for i, count in enumerate(COUNTS):
        path = write_timed(folder / f"v{i}", mixed_times(count, seed=i), ("h264-mp4", "h264-mkv-open-gop")[i % 2])
        fields = [np.concatenate([numbered_picture(n)] * 2) for n in range(count - 1)]
        flow = write_video(folder / f"v{i}_flow", fields, "mjpeg-mkv")
        info = probe_video(path)
        videos.append(Video(path, f"c{i % 2}", f"s{i}", "train", count, info.fps, info.width, info.height, flow))
    return Index(videos)


def expected_numbers(video: Video, start: int, data: DataConfig, most: int) -> list[int]:
    """Returns which frames a clip shows, in 0..most: by the times of a linear decode."""
    _, times = shown_by_linear_decode(video.path)
    samples = [max(start + data.stride * i, 0) for i in range(data.frames)]
    return [min(place, most) for place in places_at(times, Fraction(repr(data.fps)), samples, LATE)]


def plans(index: Index, data: DataConfig) -> list[Clips]:
    """Returns random and evaluation clips of every video."""
    sources, videos = Sources.of(index, data), np.arange(len(index))
    pairs = plan_pairs(sources, videos, data, seed=5, epoch=2)
    out = []
    for video in videos.tolist():
        out.append(Clips.concatenate([pairs[pairs.video == video], plan_windows(sources, video, data, None)]))
    return out


def test_clips_are_those_of_a_linear_decode(index):
    cache = FrameCache(1.0)
    for plan in plans(index, TIMED):
        video = index[int(plan.video[0])]
        for view, most in (("rgb", video.num_frames - 1), ("flow", video.num_frames - 2)):
            for read in (None, cache.read_parts, cache.read_parts):
                for clip, start in zip(fetch_frames(video, plan, view, TIMED, read), plan.start, strict=True):
                    shown = numbers_shown(clip[..., :1])
                    assert shown == expected_numbers(video, int(start), TIMED, most)


def test_the_last_sample_is_at_the_last_frame_that_all_views_have(index):
    data = replace(TIMED, stride=1, frames=1)
    for video, count in zip(index, Sources.of(index, data).num_frames, strict=True):
        _, times = shown_by_linear_decode(video.path)
        exact = times[-1 if video.flow_path is None else -2] * 10
        assert abs(count - 1 - exact) <= 9  # the mean rate places the second last frame within the step to the last
        assert video.shared_frames(data) == count
        alone = replace(video, flow_path=None)
        assert abs(alone.shared_frames(data) - 1 - times[-1] * 10) < 1 + 1e-3


def test_samples_after_the_end_show_the_last_frame(index):
    video = replace(index[0], fps=index[0].fps / 2)  # a row that says half of the rate, and so twice the length
    plan = plan_windows(Sources.of(Index([video]), TIMED), 0, TIMED, 2)[[1]]
    for view, last in (("rgb", video.num_frames - 1), ("flow", video.num_frames - 2)):
        (clip,) = fetch_frames(video, plan, view, TIMED)
        assert numbers_shown(clip[..., :1])[-1] == last


def test_packets_for_hardware_decoders_hold_the_same_frames(index):
    for plan in plans(index, TIMED)[:4]:
        video, plan = index[int(plan.video[0])], plan[np.arange(2)]
        ((encoded, chosen, order),) = fetch_packets(video, plan, "rgb", TIMED, group=2)
        with av.open(io.BytesIO(encoded.tobytes())) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert np.all(np.diff(chosen) > 0)
        for start, places in zip(plan.start, order, strict=True):
            shown = numbers_shown(frames[chosen][places])
            assert shown == expected_numbers(video, int(start), TIMED, video.num_frames - 1)


def test_records_are_sampled_at_a_named_rate(tmp_path):
    path = record_path(tmp_path / "rgb.lmdb", "a/b")
    with RecordWriter(tmp_path / "rgb.lmdb") as writer:
        pictures = [cv2.cvtColor(numbered_picture(n), cv2.COLOR_GRAY2BGR) for n in range(40)]
        writer.put("a/b", [cv2.imencode(".jpg", picture)[1].tobytes() for picture in pictures])
    video = Video(path, "", "s", "train", 40, 25.0, 64, 48)
    with pytest.raises(InputError, match=r"data\.pictures_fps: expected the frames per second .* got 0; .*rgb\.lmdb"):
        Sources.of(Index([video]), TIMED)
    data = replace(TIMED, pictures_fps=30.0)
    assert Sources.of(Index([video]), data).num_frames.tolist() == [14]
    plan = plan_windows(Sources.of(Index([video]), data), 0, data, None)
    jpegs = fetch_jpegs(video, plan, "rgb", data)
    for clip, frames, start in zip(jpegs, fetch_frames(video, plan, "rgb", data), plan.start.tolist(), strict=True):
        wanted = [3 * (start + 2 * i) for i in range(4)]
        assert numbers_shown(frames) == wanted
        assert numbers_shown(np.stack([cv2.imdecode(jpeg, cv2.IMREAD_COLOR) for jpeg in clip])) == wanted


def test_computed_flow_is_the_motion_between_neighbouring_frames(index):
    data = replace(TIMED, flow="on_the_fly", stride=1)
    video = replace(index[0], flow_path=None)
    plan = plan_windows(Sources.of(Index([video]), data), 0, data, 2)
    native = replace(data, fps=0.0, frames=1)
    for clip, start in zip(fetch_frames(video, plan, "flow", data), plan.start.tolist(), strict=True):
        for field, number in zip(clip, expected_numbers(video, start, data, video.num_frames - 2), strict=True):
            one = replace(plan[[0]], start=np.array([number]))
            np.testing.assert_array_equal(field, fetch_frames(video, one, "flow", native)[0][0])


def test_without_the_field_every_frame_counts(index):
    assert Sources.of(index, replace(TIMED, fps=0.0)).num_frames.tolist() == [count - 1 for count in COUNTS]


def test_loaders_do_not_depend_on_where_an_epoch_starts(index):
    pytest.importorskip("nvidia.dali", reason="the loaders need NVIDIA DALI")
    from cpr_fast.data.clips.loader import TrainLoader

    data = replace(TIMED, batch_size=2)
    whole, resumed = (TrainLoader(index, data, ["rgb", "flow"], seed=3) for _ in range(2))
    batches, later = list(whole.epoch(1)), list(resumed.epoch(1, start_step=2))
    whole.close(), resumed.close()
    assert len(batches) == 4 and len(later) == 2
    for a, b in zip(batches[2:], later, strict=True):
        assert torch.equal(a.plan, b.plan) and torch.equal(a.start, b.start)
        assert all(torch.equal(a.clips[view], b.clips[view]) for view in ("rgb", "flow"))


def test_short_videos_are_judged_by_their_samples(index):
    data = replace(TIMED, short_videos="drop", stride=6)
    most = data.frames // 2 * data.stride + 1
    kept = index.long_enough(data)
    assert [v.path for v in kept] == [v.path for v in index if v.shared_frames(data) > most]
    assert 0 < len(kept) < len(index)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.fps": "-1"}, r"data\.fps: expected frames per second in 0\.\.1024, 0 for none, got -1"),
        ({"data.fps": "90000"}, r"data\.fps: expected .* got 90000"),
        ({"data.fps": "nan"}, r"data\.fps"),
        ({"data.pictures_fps": "25"}, r"data\.pictures_fps: expected 0 without data\.fps"),
    ],
)
def test_rates_that_are_none(tmp_path, settings, message):
    file = tmp_path / "run.toml"
    file.write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
    with pytest.raises(InputError, match=message):
        load(file)
