"""Stored features: they equal a fresh computation, are found by video, and are never those of another video."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.videos.counted_videos import NET, CountingLoader, write_videos

from cpr_fast.config import DataConfig
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.cache import FeatureCache, embed_index, video_digest, weights_digest
from cpr_fast.evaluate.features.embedding import spatial_max
from cpr_fast.evaluate.features.recipe import make_recipe


@pytest.fixture
def opened(monkeypatch):
    monkeypatch.setattr(CountingLoader, "opened", [])
    return lambda: sorted(set(CountingLoader.opened))


def test_only_what_is_new_is_embedded_and_the_rows_are_those_of_a_fresh_run(tmp_path, opened):
    index = write_videos(tmp_path, "abcde")
    cache = FeatureCache(tmp_path / "features", "recipe")
    first, windows = embed_index(Index(list(index)[:3]), NET, CountingLoader, cache)
    assert opened() == ["a", "b", "c"] and windows.tolist() == [2, 2, 2]
    CountingLoader.opened.clear()
    mixed = Index([index[4], index[1], index[3], index[0]])
    again, windows = embed_index(mixed, NET, CountingLoader, cache)
    assert opened() == ["d", "e"] and windows.tolist() == [2] * 4
    fresh, _ = embed_index(mixed, NET, CountingLoader)
    assert torch.equal(again["net/rgb"], fresh["net/rgb"])
    assert torch.equal(again["net/rgb"][1], first["net/rgb"][1])
    assert fresh["net/rgb"][3].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]  # the mean of the two windows
    CountingLoader.opened.clear()
    embed_index(index, NET, CountingLoader, cache)
    assert opened() == []
    assert [file.suffix for file in (tmp_path / "features").iterdir()] == [".safetensors"]


def test_a_changed_video_weights_or_recipe_is_another_row(tmp_path, opened):
    index = write_videos(tmp_path, "ab")
    cache = FeatureCache(tmp_path / "features", "recipe")
    embed_index(index, NET, CountingLoader, cache)
    CountingLoader.opened.clear()
    index[1].path.write_bytes(bytes(range(50, 56)))
    os.utime(index[1].path, ns=(1, 1))
    changed, _ = embed_index(index, NET, CountingLoader, cache)
    assert opened() == ["b"] and changed["net/rgb"][1, 0] == 50.5
    for other in (FeatureCache(tmp_path / "features", "coclr"), cache):
        CountingLoader.opened.clear()
        key = "net" if other is not cache else "other weights"
        embed_index(index, {"net/rgb": dataclasses.replace(NET["net/rgb"], key=key)}, CountingLoader, other)
        assert opened() == ["a", "b"]
    longer = dataclasses.replace(index[0], num_frames=10)
    assert video_digest(longer, "rgb") != video_digest(index[0], "rgb")


@pytest.mark.parametrize("folder", [False, True])
def test_the_digest_of_a_record_is_that_of_its_lmdb_file(tmp_path, folder):
    lmdb = tmp_path / "frames.lmdb"
    file = lmdb / "data.mdb" if folder else lmdb
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"frames")
    video = dataclasses.replace(write_videos(tmp_path, "a")[0], path=Path(f"{lmdb}#a"))
    before = video_digest(video, "rgb")
    assert video_digest(video, "rgb") == before
    file.write_bytes(b"other frames")
    assert video_digest(video, "rgb") != before


def test_a_video_that_cannot_be_read_is_tried_again(tmp_path, opened, caplog):
    index = write_videos(tmp_path, "abc")
    cache = FeatureCache(tmp_path / "features", "recipe")
    for _ in range(2):
        caplog.clear()
        features, windows = embed_index(index, NET, lambda part: CountingLoader(part, "b"), cache)
        assert windows.tolist() == [2, 0, 2] and not features["net/rgb"][1].any()
        said = "features: 1 file could not be read and was left out: 1 file: does not decode: "
        assert said in caplog.text and "b.mp4" in caplog.text
    with pytest.raises(InputError, match="no window of any of the 1 video of"):
        embed_index(Index([index[1]]), NET, lambda part: CountingLoader(part, "b"), cache)


@pytest.mark.parametrize(("batches", "kept"), [(0, ""), (1, "a"), (2, "ab"), (3, "abcd")])
def test_a_stopped_pass_keeps_the_videos_that_are_complete(tmp_path, opened, batches, kept):
    class Stopped(CountingLoader):
        def __iter__(self):  # batches of three windows, two of each video, in the order of the index
            first, second = super().__iter__()
            clips = torch.stack([first.clips["rgb"], second.clips["rgb"]], 1).flatten(0, 1)
            video = first.video.repeat_interleave(2)
            for start in range(0, 3 * batches, 3):
                part = slice(start, start + 3)
                yield SimpleNamespace(clips={"rgb": clips[part]}, video=video[part])
            raise KeyboardInterrupt

    index, cache = write_videos(tmp_path, "abcdef"), FeatureCache(tmp_path / "features", "recipe")
    with pytest.raises(KeyboardInterrupt):
        embed_index(index, NET, Stopped, cache)
    CountingLoader.opened.clear()
    again, windows = embed_index(index, NET, CountingLoader, cache)
    assert opened() == sorted(set("abcdef") - set(kept)) and windows.tolist() == [2] * 6
    fresh, _ = embed_index(index, NET, CountingLoader)
    assert torch.equal(again["net/rgb"], fresh["net/rgb"])


def test_a_damaged_file_and_a_folder_that_cannot_be_written_cost_a_warning(tmp_path, opened, caplog):
    index = write_videos(tmp_path, "ab")
    cache = FeatureCache(tmp_path / "features", "recipe")
    embed_index(index, NET, CountingLoader, cache)
    path = cache.path(NET["net/rgb"])
    path.write_bytes(path.read_bytes()[:40])
    features, _ = embed_index(index, NET, CountingLoader, cache)
    assert "computed again" in caplog.text and features["net/rgb"][0, 0] == 0.5
    (tmp_path / "file").touch()
    embed_index(index, NET, CountingLoader, FeatureCache(tmp_path / "file" / "features", "recipe"))
    assert "cannot be stored" in caplog.text


def test_two_evaluations_at_the_same_time_keep_the_rows_of_both(tmp_path, opened):
    """Both have loaded the cache before either stores its rows."""
    index = write_videos(tmp_path, "abc")
    first, second = (FeatureCache(tmp_path / "features", "recipe") for _ in range(2))

    class Loader(CountingLoader):
        def __init__(self, part):
            super().__init__(part)
            embed_index(Index([index[2]]), NET, CountingLoader, second)

    embed_index(Index([index[0], index[1]]), NET, Loader, first)
    CountingLoader.opened.clear()
    embed_index(index, NET, CountingLoader, first)
    assert opened() == [] and [file.suffix for file in (tmp_path / "features").iterdir()] == [".safetensors"]


def test_weights_digest_sees_every_tensor():
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    before = weights_digest(net)
    assert weights_digest(net) == before
    net[1].running_var[1] += 1e-3
    assert weights_digest(net) != before


def test_a_recipes_identity_holds_what_features_depend_on():
    data = DataConfig()
    identity = make_recipe("paper").identity(data, "cpu")
    assert make_recipe("paper").identity(dataclasses.replace(data, workers=9, index="x.csv"), "cpu") == identity
    others = [
        make_recipe("coclr").identity(data, "cpu"),
        make_recipe("iic").identity(data, "cpu"),
        make_recipe("paper", 10).identity(data, "cpu"),
        make_recipe("paper", crops=10).identity(data, "cpu"),
        make_recipe("paper").identity(dataclasses.replace(data, stride=2), "cpu"),
        make_recipe("paper").identity(data, "cuda:0"),
    ]
    assert len({identity, *others}) == 7
    assert make_recipe("paper").leakage is None and "test split" in make_recipe("coclr").leakage
    assert make_recipe("paper").jitter_seed is None and make_recipe("coclr").jitter_seed == 0
    for arguments in (("x",), ("paper", 0)):
        with pytest.raises(InputError):
            make_recipe(*arguments)


def test_iic_features_are_the_spatially_pooled_map():
    maps = torch.randn(2, 5, 2, 7, 7, generator=torch.Generator().manual_seed(0))
    encoder = SimpleNamespace(outputs=lambda clips: maps)
    got = spatial_max(encoder, torch.zeros(2, 3, 4, 8, 8))
    expected = maps[..., :6, :6].unfold(3, 2, 2).unfold(4, 2, 2).amax((-2, -1)).flatten(1)
    assert got.shape == (2, 5 * 2 * 3 * 3) and torch.equal(got, expected)
    tiny = SimpleNamespace(outputs=lambda clips: F.pad(maps[..., :1, :1], (0, 1)))
    assert spatial_max(tiny, torch.zeros(2, 3, 4, 8, 8)).shape == (2, 10)


def test_features_sampled_by_time_depend_on_the_listed_rate(tmp_path):
    index, recipe = write_videos(tmp_path, "a"), make_recipe("paper")
    native, timed = (recipe.identity(DataConfig(fps=fps), "cpu") for fps in (0.0, 10.0))
    assert '"fps"' not in native and "pictures_fps" not in native  # as before the setting existed
    listed_again = dataclasses.replace(index[0], fps=2 * index[0].fps)
    assert video_digest(index[0], "rgb", native) == video_digest(listed_again, "rgb", native)
    assert video_digest(index[0], "rgb", native) == video_digest(index[0], "rgb")
    assert video_digest(index[0], "rgb", timed) != video_digest(listed_again, "rgb", timed)
