"""The stream of training batches of a store."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.data_sets.small_stores import features_of, make_clips, make_store

from cpr_fast.config import DataConfig
from cpr_fast.data.features import stream
from cpr_fast.data.features.index import StoredClips
from cpr_fast.data.features.store import FeatureStore
from cpr_fast.data.features.stream import FeatureLoader, epoch_windows, sample_pairs
from cpr_fast.errors import InputError

COUNT = 613


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    return make_store(tmp_path_factory.mktemp("stores") / "s", count=COUNT, shard=200)


def loader(index, batch_size=37, window=128, views=("rgb", "flow"), seed=0, **ranks) -> FeatureLoader:
    return FeatureLoader(index, DataConfig(batch_size=batch_size, window=window), views, seed=seed, **ranks)


def test_batches_hold_the_two_samples_of_every_view_that_they_name(store):
    index = StoredClips(store).select("train")
    wanted = {view: torch.from_numpy(features_of(COUNT, 3, 16, view).astype("float16")).float() for view in
              ("rgb", "flow")}  # fmt: skip
    steps = 0
    for batch in loader(index).epoch(2):
        rows = torch.from_numpy(index.rows)[batch.video]
        for view, features in wanted.items():
            assert torch.equal(batch.clips[view], features[rows[:, None], batch.start])
        assert batch.clips["rgb"].dtype == torch.float32 and (batch.start[:, 0] != batch.start[:, 1]).all()
        assert torch.equal(batch.label, torch.from_numpy(index.labels)[batch.video])
        assert torch.equal(batch.source, torch.from_numpy(index.source_ids)[batch.video])
        steps += 1
    assert steps == len(index) // 37 == len(loader(index))


def test_an_epoch_visits_every_clip_once_and_epochs_and_seeds_differ(store):
    def order(epoch, seed=0):
        return torch.cat([batch.video for batch in loader(StoredClips(store), batch_size=1, seed=seed).epoch(epoch)])

    first = order(0)
    assert first.sort().values.tolist() == list(range(COUNT))
    assert torch.equal(first, order(0))
    for other in (order(1), order(0, seed=1)):
        assert other.sort().values.tolist() == list(range(COUNT)) and (other == first).float().mean() < 0.05


@pytest.mark.parametrize("samples", [1, 3])
def test_plans_tell_clips_and_samples_apart(tmp_path, samples):
    """The plans of an epoch are equal exactly where clip and samples are equal, whatever the batch."""
    index = StoredClips(make_store(tmp_path / "s", count=75, samples=samples, shard=50))
    plans: dict[tuple[int, ...], int] = {}
    for epoch in (0, 1):
        for batch in loader(index, batch_size=25).epoch(epoch):
            for video, start, plan in zip(batch.video, batch.start, batch.plan.tolist(), strict=True):
                assert plans.setdefault((int(video), *start.tolist()), plan) == plan
    assert len(set(plans.values())) == len(plans) >= 75


def test_the_order_is_that_of_shuffled_blocks_shuffled_within_windows():
    rows = np.sort(np.random.default_rng(0).choice(40_000, 9_001, replace=False))
    windows = epoch_windows(rows, 1024, seed=3, epoch=5)
    blocks = [set((rows[window] // stream.BLOCK).tolist()) for window in windows]
    assert sum(map(len, blocks)) == len(set().union(*blocks)) == len(set((rows // stream.BLOCK).tolist()))
    sizes = [len(some) for some in blocks]
    assert len(blocks) == -(-sum(sizes) * stream.BLOCK // 1024) and max(sizes) - min(sizes) <= 1
    order = np.concatenate(windows)
    assert np.array_equal(np.sort(order), np.arange(9_001))
    for window in windows:  # no trace of the order on the disk: neighbours follow each other as rarely as by chance
        assert abs(np.corrcoef(np.arange(len(window)), window)[0, 1]) < 0.2
    assert max(np.diff(sorted(blocks[0]))) > 2 * 1024 // stream.BLOCK  # of the whole store


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_every_pair_of_different_samples_is_drawn_equally_often(samples):
    pairs = sample_pairs(np.arange(20_000), samples, seed=0, epoch=1)
    counts = np.zeros((samples, samples))
    np.add.at(counts, tuple(pairs.T), 1)
    if samples == 1:
        assert counts[0, 0] == 20_000
        return
    assert not counts.diagonal().any()
    expected = 20_000 / (samples * (samples - 1))
    assert abs(counts[~np.eye(samples, dtype=bool)] / expected - 1).max() < 0.1
    assert not np.array_equal(pairs, sample_pairs(np.arange(20_000), samples, seed=0, epoch=2))
    some = np.array([7, 3, 19_999])  # a clip has its samples whatever clips are drawn with it
    assert np.array_equal(sample_pairs(some, samples, seed=0, epoch=1), pairs[some])


@pytest.mark.parametrize("start", [1, 7, 15])
def test_an_epoch_that_begins_in_the_middle_has_the_same_batches(store, start):
    whole = list(loader(StoredClips(store)).epoch(4))
    rest = list(loader(StoredClips(store)).epoch(4, start))
    assert len(rest) == len(whole) - start
    for a, b in zip(whole[start:], rest, strict=True):
        assert torch.equal(a.video, b.video) and torch.equal(a.clips["flow"], b.clips["flow"])


def test_processes_share_the_batches_of_a_single_one(store):
    alone = loader(StoredClips(store), batch_size=60)
    ranks = [loader(StoredClips(store), batch_size=20, rank=rank, world_size=3) for rank in range(3)]
    for whole, *parts in zip(alone.epoch(1), *(rank.epoch(1) for rank in ranks), strict=True):
        assert torch.equal(whole.clips["rgb"], torch.cat([part.clips["rgb"] for part in parts]))
        assert torch.equal(whole.start, torch.cat([part.start for part in parts]))


def test_a_window_smaller_than_a_batch_works(store):
    batches = list(loader(StoredClips(store), batch_size=300, window=1).epoch(0))
    assert len(batches) == 2 and len(set(torch.cat([batch.video for batch in batches]).tolist())) == 600


def test_only_the_windows_that_are_held_are_read(store, monkeypatch):
    read = []
    samples = FeatureStore.samples
    monkeypatch.setattr(FeatureStore, "samples", lambda self, *part: read.append(part[1:]) or samples(self, *part))
    batches = loader(StoredClips(store), batch_size=32, window=64, views=("rgb",)).epoch(0)
    next(batches)
    batches.close()
    assert all(b - a <= stream.BLOCK for a, b in read)
    assert 0 < len(read) <= 6  # of 10 blocks: this window, and those that were read ahead


def test_bad_input_is_named(tmp_path, store):
    with pytest.raises(InputError, match="data.features: expected features of the view 'residual'.* has rgb, flow"):
        loader(StoredClips(store), views=("rgb", "residual"))
    with pytest.raises(InputError, match="data.batch_size: the store holds 613 training clips, fewer than one batch of "
                       "400 x 2 processes"):  # fmt: skip
        loader(StoredClips(store), batch_size=400, world_size=2)
    bad = make_store(tmp_path / "s", make_clips(40), samples=2)
    path = bad.folder / "flow-00001.safetensors"
    tensors = load_file(path)
    tensors["samples"][3, 1, 0] = np.inf
    save_file(tensors, path)
    with pytest.raises(InputError, match="flow-00001.safetensors: expected finite features, .* row 26, 'c1/v26.avi'"):
        list(loader(StoredClips(bad), batch_size=10).epoch(0))
