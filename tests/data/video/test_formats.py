"""Video files in every container that people have: found by `index`, with their frames and frame rate, or reported."""

from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from support.numbered_videos import decode_linearly, numbered_picture, numbers_shown

from cpr_fast.cli import main
from cpr_fast.data.index.build import build_index
from cpr_fast.data.index.index import Index
from cpr_fast.data.video.decode import read_frames
from cpr_fast.data.video.probe import ASSUMED_FPS, frame_rate, probe_video
from cpr_fast.data.video.transcode import transcode_video

FRAMES = 30
# suffix, container, codec, size (some codecs allow few), pixel format
FORMATS = [
    (".264", "h264", "libx264", (64, 48), "yuv420p"), (".3g2", "3g2", "mpeg4", (64, 48), "yuv420p"),
    (".3gp", "3gp", "h263", (176, 144), "yuv420p"), (".asf", "asf", "msmpeg4v3", (64, 48), "yuv420p"),
    (".avi", "avi", "mpeg4", (64, 48), "yuv420p"), (".divx", "avi", "mpeg4", (64, 48), "yuv420p"),
    (".dv", "dv", "dvvideo", (720, 576), "yuv420p"), (".f4v", "f4v", "libx264", (64, 48), "yuv420p"),
    (".flv", "flv", "flv", (64, 48), "yuv420p"), (".h264", "h264", "libx264", (64, 48), "yuv420p"),
    (".ismv", "ismv", "libx264", (64, 48), "yuv420p"), (".ivf", "ivf", "libvpx", (64, 48), "yuv420p"),
    (".m1v", "mpeg1video", "mpeg1video", (64, 48), "yuv420p"), (".m2ts", "mpegts", "libx264", (64, 48), "yuv420p"),
    (".m2v", "mpeg2video", "mpeg2video", (64, 48), "yuv420p"), (".m4v", "ipod", "libx264", (64, 48), "yuv420p"),
    (".mjpeg", "mjpeg", "mjpeg", (64, 48), "yuvj420p"), (".mk3d", "matroska", "libx264", (64, 48), "yuv420p"),
    (".mkv", "matroska", "libx264", (64, 48), "yuv420p"), (".mod", "dvd", "mpeg2video", (64, 48), "yuv420p"),
    (".mov", "mov", "prores_ks", (64, 48), "yuv422p10le"), (".mp4", "mp4", "libx264", (64, 48), "yuv420p"),
    (".mpeg", "mpeg", "mpeg1video", (64, 48), "yuv420p"), (".mpg", "dvd", "mpeg2video", (64, 48), "yuv420p"),
    (".mts", "mpegts", "libx264", (64, 48), "yuv420p"), (".mxf", "mxf", "mpeg2video", (64, 48), "yuv420p"),
    (".nut", "nut", "mpeg4", (64, 48), "yuv420p"), (".rm", "rm", "rv20", (176, 144), "yuv420p"),
    (".ts", "mpegts", "mpeg2video", (64, 48), "yuv420p"), (".vob", "vob", "mpeg2video", (64, 48), "yuv420p"),
    (".webm", "webm", "libvpx", (64, 48), "yuv420p"), (".wmv", "asf", "wmv2", (64, 48), "yuv420p"),
    (".wtv", "wtv", "mpeg2video", (64, 48), "yuv420p"), (".y4m", "yuv4mpegpipe", "rawvideo", (64, 48), "yuv420p"),
    (".unknown", "yuv4mpegpipe", "rawvideo", (64, 48), "yuv420p"), ("", "ivf", "libvpx", (64, 48), "yuv420p"),
]  # fmt: skip


def write(path, container, codec, size, pixel_format, *, frames=FRAMES, rate=25):
    """Writes a video whose frames show their own number."""
    with av.open(f"file:{path}", "w", format=container) as output:
        stream = output.add_stream(codec, rate=Fraction(rate), options={"g": "12"})
        stream.width, stream.height = size
        stream.pix_fmt, stream.bit_rate = pixel_format, 2_000_000
        for number in range(frames):
            picture = av.VideoFrame.from_ndarray(numbered_picture(number), format="gray")
            output.mux(stream.encode(picture.reformat(*size, format=pixel_format)))
        output.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("suffix", "container", "codec", "size", "pixels"), FORMATS, ids=[f[0] for f in FORMATS])
def test_every_format_is_listed_with_its_frames_and_rate(tmp_path, suffix, container, codec, size, pixels):
    path = write(tmp_path / f"video{suffix}", container, codec, size, pixels)
    index, problems = build_index(tmp_path)
    assert not problems
    assert [(v.path, v.num_frames, v.fps, (v.width, v.height)) for v in index] == [(path, FRAMES, 25, size)]
    truth = decode_linearly(path)
    for frames in ([0], [11, 13, 26], [FRAMES - 1]):
        found = read_frames(path, frames, "rgb", FRAMES)
        np.testing.assert_array_equal(found, truth[frames])
        if size == (64, 48):
            assert numbers_shown(found) == frames
    assert probe_video(path, decode=False).num_frames == FRAMES


def test_files_that_are_not_read_are_counted_by_suffix(tmp_path, capsys):
    for name in ("a.gif", "b.gif", "c.apng"):
        write(
            tmp_path / name,
            *(("gif", "gif", (64, 48), "rgb8") if "gif" in name else ("apng", "apng", (64, 48), "rgb24")),
        )
    (tmp_path / "raw.yuv").write_bytes(bytes(range(256)) * 20)
    assert main(["index", str(tmp_path), "--out", str(tmp_path / "i.csv")]) == 2
    said = capsys.readouterr().err
    assert "it holds other files: 2 .gif, 1 .apng, 1 .yuv (animations are not read; encode them as videos)" in said
    write(tmp_path / "video.mp4", "mp4", "libx264", (64, 48), "yuv420p")
    assert main(["index", str(tmp_path), "--out", str(tmp_path / "i.csv")]) == 0
    assert "Other files, not read: 2 .gif, 1 .apng, 1 .yuv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rate", "size", "pixels"), [(25, (720, 576), "yuv420p"), ("30000/1001", (720, 480), "yuv411p")]
)
def test_the_clock_of_raw_dv_is_not_its_frame_rate(tmp_path, rate, size, pixels):
    path = write(tmp_path / "tape.dv", "dv", "dvvideo", size, pixels, frames=6, rate=rate)
    assert probe_video(path).fps == probe_video(path, decode=False).fps == float(Fraction(rate))
    assert transcode_video(path, tmp_path / "tape.mp4", 240).fps == pytest.approx(float(Fraction(rate)))
    assert probe_video(tmp_path / "tape.mp4").fps == pytest.approx(float(Fraction(rate)), rel=1e-3)


@pytest.mark.parametrize(("frames", "fps"), [(1, ASSUMED_FPS), (2, 25), (3, 25)])
def test_short_asf_has_the_rate_of_its_frames_and_not_of_its_clock(tmp_path, frames, fps):
    write(tmp_path / "video.wmv", "asf", "wmv2", (64, 48), "yuv420p", frames=frames)
    index, _ = build_index(tmp_path, out=tmp_path / "i.csv")
    assert [video.fps for video in index] == [video.fps for video in Index.load(tmp_path / "i.csv")] == [fps]


def test_a_frame_rate_that_was_assumed_is_reported(tmp_path, capsys):
    write(tmp_path / "video.wmv", "asf", "wmv2", (64, 48), "yuv420p", frames=1)
    assert main(["index", str(tmp_path), "--out", str(tmp_path / "i.csv")]) == 0
    assert "1 no_rate (frame rate not stated): " in (said := capsys.readouterr().out)
    assert "does not say its frame rate; the index says 25" in said


@pytest.mark.parametrize(
    ("average", "guessed", "expected"),
    [(25, 50, 25), (60000, 25, 25), (None, 30, 30), (0, 30, 30), (90000, 90000, None), (None, None, None),
     (1000, 1000, None), (Fraction(30000, 1001), None, Fraction(30000, 1001)), (Fraction(1, 10), 1, Fraction(1, 10))],
)  # fmt: skip
def test_which_rate_is_believed(average, guessed, expected):
    assert frame_rate(SimpleNamespace(average_rate=average, guessed_rate=guessed)) == expected
