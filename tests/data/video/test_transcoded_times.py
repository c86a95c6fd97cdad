"""Re-encoded videos are shown at the times of their source, whatever its rate."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from support.videos.timed_videos import (
    TIMED,
    mixed_times,
    places_at,
    shown_by_linear_decode,
    with_edit_list,
    write_timed,
)

from cpr_fast.config import DataConfig
from cpr_fast.data.index.build import IndexOptions, write_index
from cpr_fast.data.index.index import Index
from cpr_fast.data.storage.times import shown_frames
from cpr_fast.data.video.probe import probe_video
from cpr_fast.data.video.transcode import transcode_video

SIDE = 48  # the sources are larger


def assert_same_times(source: Path, copy: Path) -> list[Fraction]:
    numbers, times = shown_by_linear_decode(source)
    assert shown_by_linear_decode(copy) == (numbers, times)
    return times


@pytest.mark.parametrize("kind", TIMED)
def test_a_variable_rate_keeps_its_times(tmp_path, kind):
    path = write_timed(tmp_path / "v", mixed_times(40, seed=1, start=70), kind)
    info = transcode_video(path, tmp_path / "new.mp4", SIDE)
    times = assert_same_times(path, tmp_path / "new.mp4")
    assert info.variable_rate and info.fps == pytest.approx(39 / float(times[-1]))
    found = dataclasses.asdict(probe_video(tmp_path / "new.mp4"))
    assert {**found, "fps": info.fps} == dataclasses.asdict(info) and found["fps"] == pytest.approx(info.fps)


def test_an_odd_clock_and_an_edit_list_are_kept(tmp_path):
    odd = write_timed(tmp_path / "odd", mixed_times(30, seed=2), "mpeg4-mp4", clock=Fraction(1001, 30_000))
    transcode_video(odd, tmp_path / "odd-new.mp4", SIDE)
    assert_same_times(odd, tmp_path / "odd-new.mp4")
    cut = with_edit_list(write_timed(tmp_path / "v", mixed_times(40, seed=3)), tmp_path / "cut.mp4", 0.5)
    info = transcode_video(cut, tmp_path / "cut-new.mp4", SIDE)
    assert_same_times(cut, tmp_path / "cut-new.mp4")
    assert info.num_frames < 40 and info.variable_rate


def test_an_even_rate_that_its_file_states_wrongly_is_that_of_the_times(tmp_path):
    path = write_timed(tmp_path / "v", range(0, 3200, 80), "mjpeg-mkv")  # Matroska states 30 as the duration of a frame
    with av.open(str(path)) as container:
        assert probe_video(path).fps == pytest.approx(12.5) != container.streams.video[0].average_rate
    info = transcode_video(path, tmp_path / "new.mp4", SIDE)
    assert info.fps == pytest.approx(12.5) and not info.variable_rate
    assert_same_times(path, tmp_path / "new.mp4")


def test_frames_of_an_index_of_copies_are_sampled_as_those_of_the_sources(tmp_path):
    (tmp_path / "set" / "a").mkdir(parents=True)
    source = write_timed(tmp_path / "set" / "a" / "v", mixed_times(60, seed=4))
    report = write_index(tmp_path / "set", tmp_path / "i.csv", IndexOptions(transcode=tmp_path / "new", short_side=32))
    (video,) = Index.load(tmp_path / "i.csv")
    assert report["counts"]["variable_rate"] == 1 and video.path != source
    _, times = shown_by_linear_decode(source)
    samples = np.arange(video.shared_frames(DataConfig(fps=7.0)))
    shown = shown_frames(video.path, samples, video.num_frames, video.fps, 7.0)
    assert shown.tolist() == places_at(times, Fraction(7), samples.tolist(), Fraction(1, 2000)) and len(samples) > 20
