"""Which stream of a file is its video, and what probing reports about streams that are damaged or change."""

import io
import shutil

import av
import numpy as np
import pytest
from support.numbered_videos import decode_linearly
from support.videos.odd_videos import (
    damage,
    pictures,
    with_cover,
    write_plain,
    write_size_change,
    write_sound,
    write_streams,
)

from cpr_fast.data.files.local import local_file
from cpr_fast.data.video import transcode
from cpr_fast.data.video.container import DISCARD, VideoError, open_video
from cpr_fast.data.video.decode import read_frames
from cpr_fast.data.video.numbering import LAYOUTS, file_identity
from cpr_fast.data.video.packets import slice_packets
from cpr_fast.data.video.probe import probe_video
from cpr_fast.data.video.transcode import transcode_video
from cpr_fast.errors import InputError


def decode_bytes(encoded: np.ndarray) -> np.ndarray:
    with av.open(io.BytesIO(encoded.tobytes())) as container:
        assert len(container.streams.video) == 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_every_reader_ignores_a_cover_picture(tmp_path):
    plain = write_plain(tmp_path / "plain.mp4")
    truth = read_frames(plain, range(20), "rgb", 20)
    covered = with_cover(shutil.copyfile(plain, tmp_path / "covered.mp4"))  # x264 may encode differently a second time
    with av.open(str(covered)) as container:
        assert container.streams.video[0].width == 200  # FFmpeg's first video stream is the cover picture
    for decode in (True, False):
        info = probe_video(covered, decode=decode)
        assert (info.num_frames, info.width, info.height, info.streams) == (20, 64, 48, "")
    for _ in range(2):  # the first read probes the streams, the second one uses what was remembered
        np.testing.assert_array_equal(read_frames(covered, [3, 14], "rgb", 20), truth[[3, 14]])
    encoded, places = slice_packets(covered, [13, 14], 20)
    np.testing.assert_array_equal(decode_bytes(encoded)[places], truth[[13, 14]])
    # with a wrong count the numbering is not certain: a decoder is given all packets of the video stream, and no others
    encoded, places = slice_packets(covered, [0, 5], 19)
    np.testing.assert_array_equal(decode_bytes(encoded), truth)
    assert places.tolist() == [0, 5]
    info = transcode_video(covered, tmp_path / "new.mp4", 48)
    assert (info.num_frames, info.width, info.height) == (20, 64, 48)


def test_sound_with_a_cover_is_no_video(tmp_path):
    path = with_cover(write_sound(tmp_path / "song.mp4"))
    with pytest.raises(VideoError, match="holds a cover picture but no video stream"):
        probe_video(path)
    with pytest.raises(VideoError, match="no video stream"):
        transcode_video(path, tmp_path / "new.mp4", 48)


@pytest.mark.parametrize(("default", "expected"), [(0, (64, 48)), (1, (96, 80))])
def test_of_several_streams_the_default_one_is_read_and_named(tmp_path, default, expected):
    path = write_streams(tmp_path / "two.mkv", pictures(20), pictures(20, 80, 96), default=default)
    info = probe_video(path)
    assert (info.width, info.height) == expected and info.num_frames == 20
    assert f"reads video stream {default} ({expected[0]}x{expected[1]})" in info.streams
    copy = transcode_video(path, tmp_path / "new.mp4", 48)
    assert copy.streams == info.streams and copy.width / copy.height == pytest.approx(
        expected[0] / expected[1], rel=0.05
    )
    for _ in range(2):
        assert read_frames(path, [3, 4], "rgb", 20).shape == (2, expected[1], expected[0], 3)


def write_with_sound(path, codec, frames=40, rate=32000):
    """Writes video and sound that alternate in the file."""
    with av.open(str(path), "w") as output:
        video, sound = output.add_stream(codec, rate=25, options={"g": "12"}), output.add_stream("mp2", rate=rate)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for picture in pictures(frames):
            noise = np.random.default_rng(0).integers(-999, 999, (1, 2 * rate // 25), np.int16)
            samples = av.AudioFrame.from_ndarray(noise, format="s16", layout="stereo")
            samples.sample_rate = rate
            output.mux([*video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")), *sound.encode(samples)])
        output.mux([*video.encode(), *sound.encode()])
    return path


@pytest.mark.parametrize(
    ("name", "codec", "format"),
    [
        ("sound.avi", "mpeg4", "avi"),
        ("sound.mp4", "libx264", "mov"),
        ("sound.mkv", "libx264", "matroska"),
        ("sound.ts", "libx264", "mpegts"),
    ],
)
def test_sound_is_passed_over_and_the_format_remembered(tmp_path, name, codec, format):
    path = write_with_sound(tmp_path / name, codec)
    truth = decode_linearly(path)
    assert len(truth) == 40
    for frames in ([0, 1], [7, 8, 30], [14], [38, 39]):  # the first read decides how the others read
        np.testing.assert_array_equal(read_frames(path, frames, "rgb", 40), truth[frames])
    assert LAYOUTS[file_identity(path, 40)].format == format
    with open_video(path, probe=False, known_format=format) as (container, stream):
        packets = [packet for packet in container.demux() if packet.size]
    assert len([packet for packet in packets if packet.stream is stream]) == 40
    assert len(packets) < 45 or DISCARD is None  # of 88 of sound, what was read when the file was opened


def test_damage_is_counted_or_makes_no_difference(tmp_path):
    """A repaired frame may depend on frames decoded before it; probing must report that."""
    path, counted = tmp_path / "video.mp4", 0
    for place in range(1, 16):
        write_plain(path, height=96, width=128)
        assert probe_video(path).corrupt == 0
        info = probe_video(damage(path, place))
        if info.corrupt or info.error:
            counted += 1
            assert info.error or info.first_corrupt == place
            continue
        whole = read_frames(path, range(20), "rgb", 20)
        for number in range(20):
            np.testing.assert_array_equal(read_frames(path, [number], "rgb", 20)[0], whole[number])
    assert counted >= 3
    assert transcode_video(path, tmp_path / "new.mp4", 48).corrupt == probe_video(path).corrupt


def test_frames_after_a_change_of_size_do_not_count(tmp_path):
    path = write_size_change(tmp_path / "joined.ts", before=20)
    info = probe_video(path)
    assert (info.num_frames, info.width, info.height) == (20, 64, 48)
    assert info.size_change == "from 64x48 yuv420p to 96x80 yuv420p"
    assert read_frames(path, [0, 18, 19], "rgb", 20).shape == (3, 48, 64, 3)
    assert transcode_video(path, tmp_path / "new.mp4", 48).num_frames == 40


@pytest.mark.parametrize("name", ["http:x.mp4", "file:x.mp4", "-x.mp4", "%03d.mp4", "#.mp4", "a\nb.mp4", "x?y=1.mp4"])
def test_names_that_ffmpeg_takes_for_something_else(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_plain(tmp_path / "plain.mp4", 5).rename(name)
    assert probe_video(name).num_frames == 5 and local_file(name) == f"file:{name}"
    assert transcode_video(tmp_path / name, tmp_path / f"new {name}", 48).num_frames == 5


def test_a_file_that_cannot_be_read_differs_from_one_that_does_not_decode(tmp_path):
    (tmp_path / "text.mp4").write_text("no video " * 100)
    for name, unreadable in (("text.mp4", False), ("gone.mp4", True)):
        with pytest.raises(VideoError) as caught, open_video(tmp_path / name):
            pass
        assert caught.value.unreadable is unreadable


def test_a_file_that_ends_too_early_is_readable(tmp_path):
    """FFmpeg reports an input/output error in this case, too."""
    (tmp_path / "empty.mkv").touch()
    (tmp_path / "cut.ts").write_bytes(write_plain(tmp_path / "v.mp4").read_bytes()[:100])
    for path in (tmp_path / "empty.mkv", tmp_path / "cut.ts"):
        with pytest.raises(VideoError) as caught:
            probe_video(path)
        assert not caught.value.unreadable


def test_a_full_disk_does_not_look_like_the_end_of_the_source(tmp_path, monkeypatch):
    source = write_plain(tmp_path / "v.mp4")
    real = transcode.av.open

    def full(file, mode="r", **options):
        return real("file:/dev/full" if mode == "w" else file, mode, **options)

    monkeypatch.setattr(transcode.av, "open", full)
    with pytest.raises((InputError, OSError), match="No space left"):
        transcode_video(source, tmp_path / "new.mp4", 48)
    assert not (tmp_path / "new.mp4").exists()


PLAYLISTS = {
    "concat.mp4": "ffconcat version 1.0\nfile v.mp4\nfile v.mp4\n",
    "hls.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nv.mp4\n#EXT-X-ENDLIST\n",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_text_that_lists_other_videos_is_no_video(tmp_path, name):
    """FFmpeg recognises these texts by their content, and would decode the videos that they name."""
    write_plain(tmp_path / "v.mp4")
    (tmp_path / name).write_text(PLAYLISTS[name])
    with av.open(str(tmp_path / name)) as container:
        assert container.streams.video
    for read in (probe_video, lambda path: read_frames(path, [0], "rgb", 20)):
        with pytest.raises(VideoError, match=f"{name}': is a list of other files .* and not a video") as caught:
            read(tmp_path / name)
        assert not caught.value.unreadable


def test_a_further_stream_of_an_unknown_codec_is_named(tmp_path):
    path = write_streams(tmp_path / "two.mkv", pictures(20), pictures(20, 80, 96), default=0)
    data = path.read_bytes()
    name = max(data.rfind(codec) for codec in (b"V_MPEG4/ISO/AVC", b"V_FFV1", b"V_MPEG4/ISO/ASP"))
    path.write_bytes(data[: name + 2] + b"X" + data[name + 3 :])
    info = probe_video(path, decode=True)
    assert info.num_frames == 20 and "not 1 (of an unknown codec)" in info.streams
