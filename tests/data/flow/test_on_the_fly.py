"""Flow computed from the frames of a clip: it equals stored flow, and training and evaluation need no stored flow."""

import dataclasses

import numpy as np
import pytest
import torch
from support.numbered_videos import clips_at

pytest.importorskip("nvidia.dali", reason="the data pipeline needs NVIDIA DALI")

from cpr_fast.cli import main
from cpr_fast.config import DataConfig
from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.clips.reader import fetch_frames
from cpr_fast.data.flow.levels import quantise
from cpr_fast.data.flow.write import write_flow
from cpr_fast.data.index.index import Index
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.data.video.decode import read_frames
from cpr_fast.errors import InputError
from cpr_fast.ops import tvl1_flow
from cpr_fast.runtime.metrics import read_metrics

STORED = DataConfig(frames=4, size=32, batch_size=4, workers=2)
COMPUTED = dataclasses.replace(STORED, flow="on_the_fly")


@pytest.fixture(scope="module")
def index_csv(tmp_path_factory):
    """24 videos of 10 frames, without flow."""
    return write_synthetic(tmp_path_factory.mktemp("set"), classes=4, videos=6, frames=10, width=66, height=50)


@pytest.fixture(scope="module")
def index(index_csv):
    return Index.load(index_csv)


def batches(index, data, views=("rgb", "flow"), **options):
    loader = TrainLoader(index, data, list(views), seed=1, **options)
    try:
        return list(loader.epoch(0))
    finally:
        loader.close()


def all_levels(video):
    """The levels of every field of a video, uint8 [N - 1, H, W, 2]."""
    gray = read_frames(video.path, np.arange(video.num_frames), "gray", video.num_frames)
    return quantise(tvl1_flow(torch.from_numpy(gray))).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pixels", [None, 50 * 66 * 2])
def test_the_fields_of_a_clip_are_those_of_the_whole_video(index, stride, pixels, monkeypatch):
    if pixels:  # several batches
        monkeypatch.setattr("cpr_fast.data.flow.on_the_fly.batch_pixels", lambda device: pixels)
    video, data = index[3], dataclasses.replace(COMPUTED, stride=stride)
    expected = all_levels(video)
    assert len(expected) == 9
    for start, clip in zip([0, 1, -2], fetch_frames(video, clips_at(video, [0, 1, -2]), "flow", data), strict=True):
        frames = np.maximum(start + stride * np.arange(4), 0)
        np.testing.assert_array_equal(clip, expected[frames])


def test_the_same_clips_as_from_stored_flow_to_its_codec(index_csv, tmp_path):
    bare = Index.load(index_csv)
    copy = tmp_path / "index.csv"
    bare.save(copy)
    write_flow(copy, tmp_path / "flow")
    for ours, theirs in zip(batches(bare, COMPUTED), batches(Index.load(copy), STORED), strict=True):
        assert torch.equal(ours.video, theirs.video) and torch.equal(ours.start, theirs.start)
        assert torch.equal(ours.clips["rgb"], theirs.clips["rgb"])
        difference = (ours.clips["flow"] - theirs.clips["flow"]).abs()
        assert difference.mean() < 0.01 and difference.max() > 0  # one level is 1 / 255 / .225 = .017


def test_cache_workers_and_rank_change_nothing(index):
    plain = batches(index, dataclasses.replace(COMPUTED, cache_gib=0, workers=1))
    for again in (batches(index, COMPUTED), batches(index, dataclasses.replace(COMPUTED, workers=3), views=["flow"])):
        for a, b in zip(plain, again, strict=True):
            assert torch.equal(a.clips["flow"], b.clips["flow"])
    half = dataclasses.replace(COMPUTED, batch_size=2)
    for step, batch in enumerate(batches(index, half, rank=1, world_size=2)):
        assert torch.equal(batch.clips["flow"], plain[step].clips["flow"][2:])


def test_a_video_of_one_frame_is_skipped_by_name(index, tmp_path, caplog):
    from support.numbered_videos import write_video

    single = write_video(tmp_path / "single", np.zeros((1, 50, 66, 3), np.uint8), "h264-bframes")
    videos = [dataclasses.replace(video) for video in list(index)[:7]]
    videos.append(dataclasses.replace(videos[0], path=single, num_frames=1, source="alone"))
    loader = TrainLoader(Index(videos), COMPUTED, ["flow"], seed=1)
    with caplog.at_level("WARNING"):
        assert sum(len(batch.video) for batch in loader.epoch(0)) == 8
    loader.close()
    assert [(path, reason) for path, reason in loader.skipped] == [(single, "has a single frame: no flow")]


def test_without_flow_and_without_the_setting_the_message_names_it(index):
    with pytest.raises(InputError, match=r"has no flow_path .* data\.flow = 'on_the_fly'"):
        batches(index, STORED)


@pytest.mark.slow
def test_training_search_and_evaluation_without_a_flow_file(index_csv, tmp_path, capsys):
    config = tmp_path / "config.toml"
    config.write_text(f"""
data = {{ index = "{index_csv}", frames = 8, size = 32, batch_size = 4, flow = "on_the_fly" }}
model = {{ width = 0.125 }}
memory = {{ size = 8, shuffle_bn_groups = 1 }}
schedule = {{ cycles = [{{ view = "flow", epochs = 2 }}, {{ view = "rgb", epochs = 1, mining = "none" }}] }}
health = {{ online_every = 1, online_split = "test" }}
run = {{ out = "{tmp_path / "run"}" }}
""")
    assert main(["pretrain", str(config)]) == 0
    steps = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "step" and row["loss"] is not None]
    assert steps and any("pmr" in row for row in steps)
    last = str(tmp_path / "run" / "checkpoints" / "last.pt")
    capsys.readouterr()
    assert main(["retrieve", last, "--index", str(index_csv), "--json"]) == 0
    assert "two_stream" in capsys.readouterr().out.replace(" ", "_")
    query = str(Index.load(index_csv)[0].path)
    assert main(["search", query, "--index", str(index_csv), "--checkpoint", last, "--json"]) == 0
    assert '"flow"' in capsys.readouterr().out
    assert not list(index_csv.parent.rglob("*flow*")) and not list(tmp_path.rglob("*.flow.*"))
