"""Flow from motion vectors: its values against a second reading of the vectors, against known motion, and in clips."""

from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from av.video.frame import PictureType
from support.data_sets.clips import DATA, texture
from support.numbered_videos import KINDS, write_numbered, write_video

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.reader import FrameCache, fetch_cut, fetch_frames
from cpr_fast.data.clips.sampling import Sources, plan_windows
from cpr_fast.data.flow.levels import dequantise
from cpr_fast.data.flow.on_the_fly import VectorFlow, frame_reader
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.storage.record_writer import RecordWriter
from cpr_fast.data.storage.records import record_path
from cpr_fast.data.video import VideoError
from cpr_fast.data.video.numbering import LAYOUTS
from cpr_fast.data.video.pixels import Region

VECTORS = replace(DATA, flow="vectors", flow_colour=False)
CODED = [kind for kind in KINDS if kind.startswith(("h264", "mpeg4"))]


def sliding(path, kind: str, frames: int = 30, height: int = 90, width: int = 134):
    """Writes a texture that slides to the left by two pixels a frame."""
    return write_video(path, texture(3, height, width, frames), kind)


def encoded(path, pictures, **options: str):
    """Encodes RGB pictures with libx264 and these options."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    return path


def levels(path, fields, num_frames: int, span: int = 1, region: Region | None = None) -> np.ndarray:
    return np.concatenate(list(VectorFlow(span)(path, np.asarray(fields), "flow", num_frames - 1, region)))


def vectors_of(path) -> list:
    """Returns the vectors of each frame, in a decode from the start with every filter; None for an intra frame."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.options = {"flags2": "+export_mvs"}
        found = [frame.side_data.get("MOTION_VECTORS") for frame in container.decode(video=0)]
        return [None if data is None else data.to_ndarray() for data in found]


def without_motion(path) -> np.ndarray:
    """Returns which frames have no vectors: intra frames and, in MPEG-4, B-frames without a P-frame after them."""
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context.name
        kinds = [PictureType(frame.pict_type).name for frame in container.decode(video=0)]
    after = [next((kind for kind in kinds[n:] if kind != "B"), "I") for n in range(len(kinds))]
    return np.array(after if codec == "mpeg4" else kinds) == "I"


@pytest.mark.parametrize("kind", CODED)
def test_a_sliding_texture_has_its_motion(tmp_path, kind):
    path = sliding(tmp_path / "v", kind)
    motion = dequantise(torch.from_numpy(levels(path, range(29), 30))).numpy()
    inside = np.median(motion[:, 16:-16, 16:-32], axis=(1, 2))
    empty = without_motion(path)[1:]
    right = np.abs(inside - (-2.0, 0.0)).max(axis=1) < 0.09  # half a level of 0.157 pixels
    assert right[~empty].mean() > 0.9 and np.abs(inside[empty]).max(initial=0) < 0.09


def test_a_frame_to_which_none_refers_is_no_reference(tmp_path):
    """B-frames without a pyramid refer to the P-frames around them, although other B-frames are nearer."""
    options = {"x264-params": "b-pyramid=none:bframes=3:b-adapt=0:scenecut=0:ref=1:keyint=40"}
    path = encoded(tmp_path / "v.mp4", texture(3, 90, 134, 25), **options)
    motion = dequantise(torch.from_numpy(levels(path, range(24), 25))).numpy()
    inside = np.median(motion[:, 16:-16, 16:-32], axis=(1, 2))
    assert np.abs(inside - (-2.0, 0.0)).max() < 0.09


def test_every_block_has_its_vector(tmp_path):
    """With one reference frame and no B-frames, each vector is the motion to the next frame."""
    noise = np.random.default_rng(0)
    noisy = [np.clip(picture + noise.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)
             for picture in texture(1, 50, 70, 20)]  # fmt: skip
    path = encoded(tmp_path / "v.mp4", noisy, bf="0", refs="1", g="8", crf="30")
    expected = np.full((19, 64, 80, 2), 128, np.uint8)
    sizes = set()
    for field, vectors in zip(expected, vectors_of(path)[1:], strict=True):
        for v in vectors if vectors is not None else ():
            top, left = v["dst_y"] - v["h"] // 2, v["dst_x"] - v["w"] // 2
            for axis, name in enumerate(("motion_x", "motion_y")):
                pixels = np.float32(-v[name]) / np.float32(v["motion_scale"])
                level = np.rint((np.clip(pixels, -20, 20) + 20) * np.float32(255 / 40))
                field[top : top + v["h"], left : left + v["w"], axis] = level
            sizes.add((int(v["h"]), int(v["w"])))
    assert len(sizes) > 2
    got = levels(path, range(19), 20)
    assert np.abs(got.astype(int) - expected[:, :50, :70]).max() <= 1 and (got == expected[:, :50, :70]).mean() > 0.99


@pytest.mark.parametrize("kind", CODED)
def test_fields_do_not_depend_on_which_others_are_read(tmp_path, kind):
    path = sliding(tmp_path / "v", kind, frames=60)
    for span in (1, 3):
        LAYOUTS.clear()
        whole = levels(path, range(59), 60, span)
        for some in ([0], [58], [7, 8, 9], [2, 31, 57], [56, 58]):
            LAYOUTS.clear()
            np.testing.assert_array_equal(levels(path, some, 60, span), whole[some])
    region = Region((7, 13, 50, 101), 90, 134)
    np.testing.assert_array_equal(levels(path, range(59), 60, 3, region), whole[:, 7:50, 13:101])


def test_motion_is_added_up_over_the_stride(tmp_path):
    path = sliding(tmp_path / "v", "h264-bframes", frames=11)
    one = dequantise(torch.from_numpy(levels(path, range(10), 11))).numpy()
    three = dequantise(torch.from_numpy(levels(path, range(10), 11, span=3))).numpy()
    for field in range(10):  # at the end fewer frames are left
        assert np.abs(three[field] - one[field : field + 3].sum(axis=0).clip(-20, 20)).max() < 3 * 0.08 + 0.08
    assert frame_reader(replace(VECTORS, stride=3)).span == 3
    assert frame_reader(replace(VECTORS, stride=3, fps=5.0)).span == 1


def test_clips_have_the_crop_of_rgb_and_come_from_the_cache_unchanged(tmp_path):
    path = sliding(tmp_path / "v", "h264-bframes", height=60, width=80)
    video = Video(path, "", "s", "train", 30, 25.0, 80, 60)
    data = replace(VECTORS, stride=2)
    sources = Sources.of(Index([video]), data)
    assert sources.num_frames.tolist() == [29]
    plan = plan_windows(sources, 0, data, None)
    cache = FrameCache(1.0, frame_reader(data))
    clips = fetch_frames(video, plan, "flow", data)
    for clip, start in zip(clips, plan.start.tolist(), strict=True):
        np.testing.assert_array_equal(clip, levels(path, range(start, start + 8, 2), 30, 2))
    for a, b in zip(
        fetch_cut(video, plan, "flow", data), fetch_cut(video, plan, "flow", data, cache.read_parts), strict=True
    ):
        assert a.shape == (4, 32, 32, 3) and (a[..., 0] == 128).all()
        np.testing.assert_array_equal(a, b)


def refused(path, num_frames: int = 12, region: Region | None = None) -> str:
    with pytest.raises(VideoError) as caught:
        levels(path, [0, 1], num_frames, region=region)
    return str(caught.value)


def test_what_holds_no_vectors_is_refused(tmp_path):
    assert "reads the motion vectors of H.264 and MPEG-4, got" in refused(write_numbered(tmp_path / "v", 12, "vp9"))
    with RecordWriter(tmp_path / "rgb.lmdb") as writer:
        writer.put("a/b", [b"x"] * 12)
    assert "every frame is a key frame" in refused(encoded(tmp_path / "i.mp4", texture(1, 48, 64, 12), g="1"))
    assert "got pictures" in refused(record_path(tmp_path / "rgb.lmdb", "a/b"))
    path = write_numbered(tmp_path / "w", 12)
    assert "the index says 50x40" in refused(path, region=Region.whole(40, 50))
    assert "holds 12 frames, the index says 20" in refused(path, 20)


def test_loaders_train_on_vectors(tmp_path):
    pytest.importorskip("nvidia.dali", reason="the loaders need NVIDIA DALI")
    from cpr_fast.data.clips.loader import TrainLoader

    paths = [sliding(tmp_path / f"v{i}", CODED[i % len(CODED)], 20, 48, 64) for i in range(4)]
    videos = [Video(path, "", path.stem, "train", 20, 25.0, 64, 48) for path in paths]
    data: DataConfig = replace(VECTORS, batch_size=2)
    loader = TrainLoader(Index(videos), data, ["rgb", "flow"], seed=1)
    batches = list(loader.epoch(0))
    loader.close()
    assert len(batches) == 2 and not loader.skipped
    assert all(batch.clips["flow"].shape == (2, 2, 3, 4, 32, 32) and batch.clips["flow"].std() > 0 for batch in batches)
