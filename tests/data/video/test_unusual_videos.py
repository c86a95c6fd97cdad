"""Videos with misleading containers or streams: frames equal those of a linear decode, or an error names the file."""

import av
import numpy as np
import pytest
from av.codec.context import Flags
from av.video.reformatter import ColorRange, Colorspace
from support.numbered_videos import decode_linearly, shared_data

from cpr_fast.data.video import decode
from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.decode import read_frames, read_parts
from cpr_fast.data.video.packets import slice_packets
from cpr_fast.data.video.probe import probe_video

FRAMES = 60
INTRA_REFRESH = {"g": "12", "bf": "0", "x264-params": "intra-refresh=1"}
INTERLACED = {"x264-params": "interlaced=1:tff=1", "g": "12", "crf": "10"}


def encode(path, codec="libx264", options=None, *, prepare=lambda frame: None, flags=0, **settings):
    """Moving noise, which shows where a frame was decoded without its reference frames."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3))
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=25, options=options or {"g": "12", "bf": "2"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.flags |= flags
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for number in range(FRAMES):
            pixels = np.roll(noise, number, axis=1).repeat(4, 0).repeat(4, 1).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            frame.pts = number
            prepare(frame)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def copied(source, path, *, first=0, time=lambda packet, start: packet.pts - start, flags=False):
    """Copies the packets to another file, shown from frame `first` on, like a cut by `ffmpeg -ss TIME -c copy`."""
    with av.open(str(source)) as container, av.open(str(path), "w") as output:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        start = sorted(packet.pts or 0 for packet in packets)[first]
        begin = max(i for i, p in enumerate(packets) if i == 0 or p.is_keyframe and p.pts <= start)
        copy = output.add_stream_from_template(stream)
        for packet in packets[begin:]:
            packet.stream, packet.pts = copy, time(packet, start)
            packet.dts = None if packet.dts is None else packet.dts - start
            packet.is_keyframe |= flags
            output.mux(packet)
    return path


def assert_exact(path):
    """Compares frames with a linear decode: read by seeking, repeatedly so that the layout is remembered, and from
    the packets for a GPU.
    """
    truth = decode_linearly(path)
    count = probe_video(path).num_frames
    assert count == len(truth)
    for start in (0, 1, 3, 11, 20, 31, count - 12):
        frames = np.arange(start, start + 12, 2)
        np.testing.assert_array_equal(read_frames(path, frames, "rgb", count), truth[frames])
        encoded, places = slice_packets(path, frames, count)
        if bytes(encoded) != path.read_bytes():
            cut = path.with_name("slice.mkv")
            encoded.tofile(cut)
            np.testing.assert_array_equal(decode_linearly(cut)[places], truth[frames])


@pytest.mark.parametrize("first", [5, 17])
@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", None),
        ("libx264", {"g": "12", "bf": "0"}),
        ("mpeg4", None),
        ("libx265", {"x265-params": "keyint=12:log-level=none"}),
    ],
)
def test_a_file_that_is_cut_inside_a_group_of_pictures(tmp_path, codec, options, first):
    path = copied(encode(tmp_path / "whole.mp4", codec, options), tmp_path / "cut.mp4", first=first)
    assert probe_video(path).num_frames == FRAMES - first
    assert_exact(path)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_intra_refresh_has_key_packets_where_no_decoding_starts(tmp_path, suffix):
    path = encode(tmp_path / f"video{suffix}", "libx264", INTRA_REFRESH)
    with av.open(str(path)) as container:
        assert sum(packet.is_keyframe for packet in container.demux(video=0)) > 1
    assert_exact(path)


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4"])
def test_every_packet_called_a_key(tmp_path, codec):
    options = {"x265-params": "keyint=12:log-level=none"} if codec == "libx265" else None
    assert_exact(copied(encode(tmp_path / "video.mkv", codec, options), tmp_path / "keys.mkv", flags=True))


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_times_of_decoding_prove_nothing(tmp_path, codec):
    """ASF stores no other times."""
    assert_exact(encode(tmp_path / "video.asf", codec))


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_packed_b_frames_that_left_their_avi(tmp_path, suffix):
    packed = shared_data("ucf101_100", "BabyCrawling", "v_BabyCrawling_g18_c06.avi")
    with av.open(str(packed)) as container, av.open(str(tmp_path / f"video{suffix}"), "w") as output:
        copy = output.add_stream_from_template(container.streams.video[0])
        for packet in container.demux(video=0):
            if packet.size:
                packet.stream = copy
                output.mux(packet)
    assert_exact(tmp_path / f"video{suffix}")


@pytest.mark.parametrize(("codec", "options"), [("libx264", INTERLACED), ("mpeg2video", None)])
def test_interlaced_chroma(tmp_path, codec, options):
    path = encode(tmp_path / "video.mkv", codec, options, flags=Flags.interlaced_dct | Flags.interlaced_me)
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    assert_exact(path)


def test_colours_that_change_within_a_file(tmp_path):
    parts = []
    for name, space in (("a.ts", Colorspace.ITU709), ("b.ts", Colorspace.ITU601)):
        colours = {"colorspace": space, "color_range": ColorRange.MPEG}

        def prepare(frame, space=space):
            frame.colorspace, frame.color_range = space, ColorRange.MPEG

        parts.append(encode(tmp_path / name, prepare=prepare, **colours).read_bytes())
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(parts))
    truth = decode_linearly(path)
    frames = list(range(FRAMES - 5, FRAMES + 5))
    np.testing.assert_array_equal(read_frames(path, frames, "rgb", len(truth)), truth[frames])


def test_frames_too_large_to_be_converted_together(tmp_path, monkeypatch):
    path = encode(tmp_path / "video.mp4")
    monkeypatch.setattr(decode, "PART_PIXELS", 3 * 48 * 64)
    parts = list(read_parts(path, range(10), "rgb", FRAMES))
    assert list(map(len, parts)) == [3, 3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(parts), decode_linearly(path)[:10])


def test_a_tag_in_latin_1_is_no_error(tmp_path):
    path = tmp_path / "video.avi"
    with av.open(str(path), "w") as output:
        output.metadata["title"] = "Cafe1234"
        stream = output.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        output.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        output.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"Cafe1234", b"Caf\xe9 \xfc12"))
    assert probe_video(path).num_frames == 1


@pytest.mark.parametrize(("pause", "variable"), [(0, False), (1, False), (10_000, True)])
def test_one_long_pause_is_a_variable_rate(tmp_path, pause, variable):
    def prepare(frame):
        frame.pts = next(number) * 2
        frame.pts += pause if frame.pts > FRAMES else 0

    number = iter(range(FRAMES))
    path = encode(tmp_path / "video.mkv", prepare=prepare)
    assert probe_video(path).variable_rate == variable


def test_a_codec_without_a_decoder_is_named(tmp_path):
    path = encode(tmp_path / "video.mp4")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz1"))
    with pytest.raises(VideoError, match=r"video\.mp4.*no decoder"):
        probe_video(path)
