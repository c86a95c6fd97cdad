"""Frames by presentation time (`data.fps`), compared with a linear decode of the whole file by PyAV."""

from fractions import Fraction

import av
import numpy as np
import pytest
from support.numbered_videos import numbers_shown, write_numbered
from support.videos.timed_videos import (
    TIMED,
    mixed_times,
    places_at,
    shown_by_linear_decode,
    with_edit_list,
    write_timed,
)

from cpr_fast.data.storage.times import TIMELINES, native_rate, sample_count, shown_frames
from cpr_fast.data.video import VideoError, probe_video, read_frames
from cpr_fast.data.video.numbering import LAYOUTS
from cpr_fast.errors import InputError

HALF_MS = Fraction(1, 2000)


def assert_samples(path, fps, *, late=None, seed=0):
    """Compares samples of a file, read in random order and by themselves, with a linear decode."""
    numbers, times = shown_by_linear_decode(path)
    info = probe_video(path)
    assert info.num_frames == len(times)
    count = int(sample_count(info.num_frames, info.fps, fps))
    assert abs(count - 1 - times[-1] * Fraction(repr(fps))) < 1 + 1e-3  # the last sample is at the last frame's time
    samples = np.arange(count + 3)  # the last ones lie after the end
    late = Fraction(0) if late is None else late
    expected = places_at(times, Fraction(repr(float(fps))), samples.tolist(), late)
    assert expected[-1] == len(times) - 1
    order = np.random.default_rng(seed).permutation(len(samples))
    for part in np.array_split(order, 3):
        LAYOUTS.clear(), TIMELINES.clear()
        places = shown_frames(path, part, info.num_frames, info.fps, fps)
        assert places.tolist() == [expected[sample] for sample in part]
        needed, back = np.unique(places, return_inverse=True)
        pixels = read_frames(path, needed, "rgb", info.num_frames)[back]
        assert numbers_shown(pixels) == [numbers[expected[sample]] for sample in part]


@pytest.mark.parametrize("fps", [10.0, 3.0, 29.97, 100.0])
@pytest.mark.parametrize("kind", TIMED)
def test_a_variable_rate_in_every_container(tmp_path, kind, fps):
    path = write_timed(tmp_path / "v", mixed_times(40), kind)
    late = {".mkv": HALF_MS, ".webm": HALF_MS, ".ts": Fraction(1, 180_000), ".mp4": Fraction(1, 32_000)}[path.suffix]
    assert_samples(path, fps, late=late)


def test_the_time_of_the_first_frame_does_not_count(tmp_path):
    assert_samples(write_timed(tmp_path / "v", mixed_times(40, seed=1, start=730), "h264-mkv-open-gop"), 10.0)


def test_frames_that_an_edit_list_cuts_off_are_not_sampled(tmp_path):
    whole = write_timed(tmp_path / "v", mixed_times(40, seed=2))
    cut = with_edit_list(whole, tmp_path / "cut.mp4", 0.5)
    assert shown_by_linear_decode(cut)[0][0] > 1 and len(shown_by_linear_decode(cut)[0]) < 40
    assert_samples(cut, 10.0, late=Fraction(1, 32_000))


def test_milliseconds_do_not_shift_a_constant_rate(tmp_path):
    """Matroska shows the third frame of 30 per second at 67 ms, after 2/30 s."""
    path = write_timed(tmp_path / "v", [round(1000 * i / 30) for i in range(60)], "h264-mkv-open-gop")
    assert shown_frames(path, np.arange(29), 60, 30.0, 15.0).tolist() == list(range(0, 58, 2))


@pytest.mark.parametrize(("kind", "rate"), [("mpeg4-avi", 25), ("mjpeg-avi", 25), ("h264-bframes", 25)])
def test_a_constant_rate(tmp_path, kind, rate):
    path = write_numbered(tmp_path / "v", 33, kind)
    for fps in (25.0, 12.5, 10.0, 5.0, 60.0):
        places = shown_frames(path, np.arange(9), 33, rate, fps)
        assert places.tolist() == [min(i * 250 // round(10 * fps), 32) for i in range(9)]
        assert numbers_shown(read_frames(path, np.unique(places), "rgb", 33)) == np.unique(places).tolist()


def test_a_stream_without_times_has_the_rate_of_the_index(tmp_path):
    with (
        av.open(str(write_numbered(tmp_path / "v", 20))) as source,
        av.open(str(tmp_path / "v.h264"), "w") as output,
    ):
        copy = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = copy
                output.mux(packet)
    assert shown_frames(tmp_path / "v.h264", np.arange(5), 20, 20.0, 10.0).tolist() == [0, 2, 4, 6, 8]


def test_the_index_lists_the_mean_rate_of_a_variable_one(tmp_path):
    path = write_timed(tmp_path / "v", times := mixed_times(40), "h264-mkv-open-gop")
    for decode in (True, False):
        info = probe_video(path, decode=decode)
        assert info.fps == pytest.approx(39 / (times[-1] - times[0]) * 1000) and info.variable_rate


def test_a_stated_rate_that_the_times_contradict_is_replaced(tmp_path):
    """A file of 30 frames per second whose frames are shown at 10 per second, evenly."""
    path = write_timed(tmp_path / "v", range(0, 4000, 100), "h264-mkv-open-gop")
    with av.open(str(path)) as container:
        stated = float(container.streams.video[0].average_rate)
    for decode in (True, False):
        info = probe_video(path, decode=decode)
        assert info.fps == pytest.approx(10.0, rel=1e-6) and not info.variable_rate
    assert stated == pytest.approx(30.0)


def test_counts():
    assert sample_count(np.array([0, 1, 2, 31, 301]), 30.0, 10.0).tolist() == [0, 1, 1, 11, 101]
    assert sample_count(301, 29.97, 29.97) == 301  # six digits of the rate
    assert sample_count(np.array([300, 300]), np.array([25.0, 30.0]), 5.0).tolist() == [60, 50]


def test_pictures_need_a_named_rate(tmp_path):
    frames = tmp_path / "img_%05d.jpg"
    with pytest.raises(InputError, match=r"data\.pictures_fps: expected .* got 0; the first is '.*img_%05d\.jpg'"):
        native_rate(frames, 25.0, 0.0)
    with pytest.raises(InputError, match="LMDB"):
        native_rate(tmp_path / "x.lmdb#a/b", 25.0, 0.0)
    assert native_rate(frames, 25.0, 30.0) == 30.0 and native_rate(tmp_path / "x.mp4", 25.0, 30.0) == 25.0
    assert shown_frames(frames, np.arange(5), 12, 30.0, 10.0).tolist() == [0, 3, 6, 9, 11]


def test_a_file_of_fewer_frames_than_listed(tmp_path):
    path = write_timed(tmp_path / "v", mixed_times(20))
    with pytest.raises(VideoError, match="holds 20 frames, the index says 25"):
        shown_frames(path, np.arange(3), 25, 25.0, 10.0)
    with pytest.raises(VideoError, match="No such file"):
        shown_frames(tmp_path / "none.mp4", np.arange(3), 25, 25.0, 10.0)
