"""For every codec and container, the requested frames are read, and packets decode to them; errors name bad files."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.codec.context import Flags
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace
from support.numbered_videos import (
    KINDS,
    decode_linearly,
    numbered_picture,
    numbers_shown,
    shared_data,
    write_numbered,
    write_video,
)

from cpr_fast.data.video import decode
from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.decode import decode_frames, joined, read_frames, read_parts
from cpr_fast.data.video.numbering import Layout
from cpr_fast.data.video.packets import slice_packets
from cpr_fast.data.video.pixels import Region
from cpr_fast.data.video.probe import probe_video

FRAMES = 47  # of every numbered video; not a multiple of the length of a group of pictures
CHOICES = ([0], [46], [11, 12, 13], [5, 24, 25, 40], list(range(30, 46)), list(range(FRAMES)))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbered")
    return {kind: write_numbered(folder / kind, FRAMES, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_show_the_number_asked_for(numbered, kind):
    path = numbered[kind]
    info = probe_video(path)
    assert (info.num_frames, info.width, info.height, info.fps, info.error) == (FRAMES, 64, 48, 25.0, "")
    truth = decode_linearly(path)
    for frames in CHOICES:
        pixels = read_frames(path, frames, "rgb", FRAMES)
        assert numbers_shown(pixels) == frames
        np.testing.assert_array_equal(pixels, truth[frames])


@pytest.mark.parametrize(
    "clip",
    [
        ("ucf101_100", "Archery", "v_Archery_g02_c02.avi"),
        ("ucf101_100", "BabyCrawling", "v_BabyCrawling_g18_c06.avi"),
        ("ucf101_100", "Biking", "v_Biking_g01_c04.avi"),
        ("tiny", "mmaction2_test.avi"),
        ("tiny", "eat.mkv"),
        ("tiny", "h264_10bits.mp4"),
    ],
    ids=lambda clip: clip[-1],
)
def test_real_clips_equal_a_linear_decode(clip):
    path = shared_data(*clip)
    truth = decode_linearly(path)
    num_frames = len(truth)
    assert probe_video(path).num_frames == num_frames
    rng = np.random.default_rng(0)
    scattered = (np.sort(rng.choice(num_frames, 8, replace=False)) for _ in range(3))
    clips = (np.arange(f, f + 16) for f in [0, num_frames - 16, *rng.integers(0, num_frames - 16, 3)])
    for frames in (*clips, *scattered):
        np.testing.assert_array_equal(read_frames(path, frames, "rgb", num_frames), truth[frames])


def test_a_header_that_counts_too_many_frames_is_not_believed():
    """The counts of the UCF101 clips come from decoding: for a sample of them, probing by packets must agree."""
    table = np.genfromtxt(shared_data("ucf101_100", "PROBE.csv"), delimiter=",", names=True, dtype=None, encoding=None)
    for row in table[::20]:
        assert probe_video(shared_data("ucf101_100", row["path"])).num_frames == row["frames"]


@pytest.mark.parametrize("kind", KINDS)
def test_sliced_packets_hold_the_frames(numbered, kind, tmp_path):
    path = numbered[kind]
    for frames in (*CHOICES, [*range(4, 9), *range(37, 41)], [0, 46], [9, 10, 21, 22, 33]):
        encoded, places = slice_packets(path, frames, FRAMES)
        assert encoded.dtype == np.uint8 and places.dtype == np.int32
        (tmp_path / "slice").write_bytes(encoded)
        shown = numbers_shown(decode_linearly(tmp_path / "slice"))
        assert [shown[place] for place in places] == frames


def test_a_slice_starts_at_the_previous_key_frame_and_ends_at_the_last_frame(numbered, tmp_path):
    for kind, key in {"h264-bframes": 24, "vp9": 20, "mjpeg-mkv": 26}.items():
        encoded, places = slice_packets(numbered[kind], [26, 27], FRAMES)
        (tmp_path / "slice").write_bytes(encoded)
        assert places.tolist() == [26 - key, 27 - key]
        assert len(decode_linearly(tmp_path / "slice")) <= 27 - key + 1 + 2  # at most the reference frames of B-frames


def test_a_slice_leaves_out_the_groups_of_pictures_between_two_clips(numbered, tmp_path):
    for kind, key in {"h264-bframes": 36, "vp9": 40, "mjpeg-mkv": 41}.items():
        encoded, places = slice_packets(numbered[kind], [0, 1, 41, 42], FRAMES)
        (tmp_path / "slice").write_bytes(encoded)
        assert len(decode_linearly(tmp_path / "slice")) <= 2 + (42 - key + 1) + 4
        assert places[2] <= 41 - key + 2 + 2


def test_an_encoder_that_packets_do_not_name(tmp_path):
    """MPEG-4 with its headers only in the container: no key packet names the encoder, on whose conventions decoding
    depends.
    """
    path = tmp_path / "global.avi"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=25, options={"g": "12", "bf": "2"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.flags |= Flags.global_header
        for number in range(FRAMES):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_picture(number), format="gray")))
        output.mux(stream.encode(None))
    truth = decode_linearly(path)
    for frames in CHOICES:
        np.testing.assert_array_equal(read_frames(path, frames, "rgb", FRAMES), truth[frames])
    assert decode.LAYOUTS[decode.file_identity(path, FRAMES)].first_alone


def test_a_file_that_has_changed_is_read_anew(tmp_path):
    path = write_numbered(tmp_path / "video", 40, "mpeg4-avi")
    assert numbers_shown(read_frames(path, [30, 31], "rgb", 40)) == [30, 31]
    write_video(tmp_path / "video", [numbered_picture(99 - i) for i in range(40)], "mpeg4-avi")
    os.utime(path, ns=(1, 1))
    assert numbers_shown(read_frames(path, [30, 31], "rgb", 40)) == [69, 68]


def test_a_container_that_seeks_to_the_wrong_place_costs_time_alone(numbered, monkeypatch):
    path = numbered["h264-bframes"]
    expected = read_frames(path, [5, 6], "rgb", FRAMES)
    elsewhere = int(decode.LAYOUTS[decode.file_identity(path, FRAMES)].start(FRAMES - 1))

    @contextmanager
    def opened(path, real=decode.open_video, **options):
        with real(path, **options) as (container, stream):
            container.seek(elsewhere, stream=stream)  # demultiplexing starts there
            yield container, stream

    calls = iter([opened, decode.open_video])
    monkeypatch.setattr(decode, "open_video", lambda path, **options: next(calls)(path, **options))
    np.testing.assert_array_equal(read_frames(path, [5, 6], "rgb", FRAMES), expected)
    assert next(calls, None) is None
    assert decode.LAYOUTS[
        decode.file_identity(path, FRAMES)
    ].probe  # from now on the streams are probed when it is opened


@pytest.mark.parametrize("kind", ["h264-bframes", "mpeg4-avi"])
def test_decoding_starts_at_the_key_frame_and_passes_over_b_frames(numbered, kind):
    with av.open(str(numbered[kind])) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        kinds = [frame.pict_type for frame in container.decode(stream)]
    with av.open(str(numbered[kind])) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        packets = list(container.demux(stream))
        layout = Layout.of(container, stream, packets, FRAMES)
        decoder = Recorder(stream.codec_context)
        wanted = [
            number
            for number, _ in decode_frames(container, SimpleNamespace(codec_context=decoder), layout, [30, 31], packets)
        ]
    assert wanted == [30, 31]
    decoded = layout.numbers(decoder.times).tolist()  # in presentation order
    shown = [number for number in decoded if number <= 31]
    assert shown[0] == 24 and {30, 31} <= set(shown)
    referenced = [number for number in range(24, 32) if kinds[number] != PictureType.B]
    assert set(referenced) <= set(shown) and len(shown) < 31 - 24 + 1


class Recorder:
    """Wraps a decoder, and records the times of the frames that it returned."""

    def __init__(self, decoder):
        self.decoder, self.name, self.times = decoder, decoder.name, []

    def __setattr__(self, name, value):
        setattr(self.decoder, name, value) if name == "skip_frame" else super().__setattr__(name, value)

    def decode(self, packet):
        frames = self.decoder.decode(packet)
        self.times += [frame.pts for frame in frames]
        return frames


def random_region(rng, height, width):
    top, left = rng.integers(0, height), rng.integers(0, width)
    return Region((top, left, rng.integers(top, height) + 1, rng.integers(left, width) + 1), height, width)


def assert_regions(path, truth, rng):
    """Random boxes of random frames equal, bit for bit, the same boxes cut from whole frames."""
    for _ in range(8):
        region = random_region(rng, *truth.shape[1:3])
        frames = np.unique(rng.integers(0, len(truth), rng.integers(1, 20)))
        top, left, bottom, right = region.box
        parts = list(read_parts(path, frames, "rgb", len(truth), region))
        np.testing.assert_array_equal(np.concatenate(parts), truth[frames, top:bottom, left:right])
        assert max(map(len, parts)) <= decode.PART


@pytest.mark.parametrize("kind", KINDS)
def test_a_region_is_cut_from_whole_frames(numbered, kind):
    assert_regions(numbered[kind], decode_linearly(numbered[kind]), np.random.default_rng(0))


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p", "gray", "yuv420p10le"])
@pytest.mark.parametrize("colours", [None, (ColorRange.MPEG, Colorspace.ITU709), (ColorRange.JPEG, Colorspace.ITU601)])
@pytest.mark.parametrize(("height", "width"), [(48, 64), (50, 66), (48, 37), (35, 64), (90, 170)])
def test_a_region_of_noise(tmp_path, pixel_format, colours, height, width):
    """Noise shows where chroma is shared or interpolated; most sizes are not multiples of a block."""
    rng, path = np.random.default_rng(1), tmp_path / "noise.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, pixel_format
        for number in range(20):
            pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pixel_format)
            frame.pts = number
            if colours is not None:
                frame.color_range, frame.colorspace = colours
                stream.codec_context.color_range, stream.codec_context.colorspace = colours
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    truth = decode_linearly(path)
    np.testing.assert_array_equal(read_frames(path, range(20), "rgb", 20), truth)
    assert_regions(path, truth, rng)


def test_a_region_of_frames_of_another_size(numbered):
    for view, region in (("rgb", Region.whole(48, 66)), ("flow", Region.whole(48, 64))):
        with pytest.raises(VideoError, match=f"decodes to 64x{48 if view == 'rgb' else 24}, the index says"):
            list(read_parts(numbered["vp9"], [0], view, FRAMES, region))


def test_flow_is_the_two_halves_of_the_luma_as_stored(tmp_path):
    rng = np.random.default_rng(0)
    uv = rng.integers(0, 256, (9, 2, 3, 8)).repeat(8, 2).repeat(8, 3).astype(np.uint8)  # [F, 2, 24, 64]
    path = write_video(tmp_path / "flow", uv.reshape(9, 48, 64), "mjpeg-mkv")
    read = read_frames(path, [2, 3, 8], "flow", 9)
    assert read.shape == (3, 24, 64, 2)
    assert np.abs(read.astype(int) - uv[[2, 3, 8]].transpose(0, 2, 3, 1)).max() <= 12  # the error of the codec
    limited = write_video(tmp_path / "limited", uv.reshape(9, 48, 64), "h264-bframes")
    with av.open(str(limited)) as container:
        stored = [np.frombuffer(f.planes[0], np.uint8).reshape(48, -1)[:, :64] for f in container.decode(video=0)]
    luma = np.stack(stored).reshape(9, 2, 24, 64).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(read_frames(limited, range(9), "flow", 9), luma)
    part = list(read_parts(limited, range(9), "flow", 9, Region((3, 5, 20, 50), 24, 64)))
    np.testing.assert_array_equal(np.concatenate(part), luma[:, 3:20, 5:50])


def test_parts_are_joined_and_a_single_part_is_not_copied():
    frames = np.random.default_rng(0).integers(0, 256, (7, 3, 5, 2), np.uint8)
    for ends in ([3, 6, 7], [1, 7], [6, 7]):
        parts = (frames[begin:end] for begin, end in pairwise([0, *ends]))
        np.testing.assert_array_equal(joined(parts, 7), frames)
    assert joined(iter([frames]), 7) is frames


def test_reading_from_many_threads_gives_the_same_frames(numbered):
    truth = {kind: decode_linearly(path) for kind, path in numbered.items()}

    def wrong(kind):
        clips = (np.arange(first, first + 9) for first in range(0, 30, 7))
        return [f for f in clips if not np.array_equal(read_frames(numbered[kind], f, "rgb", FRAMES), truth[kind][f])]

    with ThreadPoolExecutor(8) as pool:
        assert not any(pool.map(wrong, [*KINDS, *KINDS]))


class TestBadFiles:
    def refuse(self, path, reason, num_frames=20):
        with pytest.raises(VideoError, match=reason) as caught:
            read_frames(path, np.arange(4, 10), "rgb", num_frames)
        assert caught.value.path == path and str(path) in str(caught.value)

    def test_missing(self, tmp_path):
        self.refuse(tmp_path / "none.mp4", "No such file")
        with pytest.raises(VideoError, match="No such file"):
            probe_video(tmp_path / "none.mp4")

    def test_not_a_video(self, tmp_path):
        (tmp_path / "text.mp4").write_text("no video, but a long enough text " * 40)
        self.refuse(tmp_path / "text.mp4", "Invalid data")

    def test_empty(self, tmp_path):
        (tmp_path / "empty.avi").touch()
        self.refuse(tmp_path / "empty.avi", ".")
        with pytest.raises(VideoError):
            probe_video(tmp_path / "empty.avi")

    def test_sound_only(self, tmp_path):
        path = tmp_path / "sound.mkv"
        with av.open(str(path), "w") as output:
            stream = output.add_stream("pcm_s16le", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
            frame.sample_rate = 8000
            output.mux(stream.encode(frame))
        self.refuse(path, "no video stream")

    def test_truncated_is_counted_up_to_the_damage(self, numbered, tmp_path):
        whole = numbered["mjpeg-avi"].read_bytes()
        path = tmp_path / "cut.avi"
        path.write_bytes(whole[: len(whole) // 2])
        info = probe_video(path)
        assert 10 < info.num_frames < FRAMES
        frames = np.arange(info.num_frames - 3, info.num_frames)
        assert numbers_shown(read_frames(path, frames, "rgb", info.num_frames)) == frames.tolist()
        self.refuse_frames(path, [info.num_frames + 2], FRAMES)

    def refuse_frames(self, path, frames, num_frames):
        with pytest.raises(VideoError, match="does not decode|Invalid data|the index says"):
            read_frames(path, frames, "rgb", num_frames)

    def test_fewer_frames_than_the_index_says(self, numbered):
        """Every read says so, the first one and later ones, also of frames that the file has."""
        for path in numbered.values():
            said = f"holds {FRAMES} frames, the index says {FRAMES + 5}: .* `cpr-fast index`; `cpr-fast doctor`"
            for frames in ([0, 1], [2, 3], [FRAMES - 1, FRAMES, FRAMES + 1]):
                with pytest.raises(VideoError, match=said):
                    read_frames(path, frames, "rgb", FRAMES + 5)
                if path.suffix not in (".avi", ".flow"):  # whose packets do not tell
                    with pytest.raises(VideoError, match=said):
                        slice_packets(path, frames, FRAMES + 5)
            assert numbers_shown(read_frames(path, [2, 3], "rgb", FRAMES)) == [2, 3]
        with pytest.raises(VideoError, match=f"holds {FRAMES} fields of flow, the index says {FRAMES + 6} frames"):
            read_frames(numbered["vp9"], [0], "flow", FRAMES + 5)

    def test_slices_outside_the_video(self, numbered):
        with pytest.raises(VideoError, match=r"expected frames within 0\.\.46, got 40\.\.50"):
            slice_packets(numbered["vp9"], [40, 50], FRAMES)

    def test_rotated_is_named_and_refused(self):
        path = shared_data("tiny", "rotated_90.mov")
        assert [probe_video(path, decode=decode).rotation for decode in (True, False)] == [270, 270]
        self.refuse(path, "rotated")

    def test_damage_in_the_middle_is_reported(self):
        info = probe_video(shared_data("tiny", "corrupted.mp4"))
        assert info.num_frames == 28 and "Invalid data" in info.error
