"""Compares the ring memory with a plain list of the newest keys."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from cpr_fast.pretrain.state.memory import Memory


def enqueue(memory: Memory, first: int, batch: int, step: int) -> torch.Tensor:
    """Returns keys in which every number identifies the key."""
    views, _, width = memory.features.shape
    number = torch.arange(first, first + batch)
    keys = (number[None, :, None] + torch.arange(views)[:, None, None] * 1000).expand(views, batch, width).float()
    memory.enqueue(keys, source=number // 2, video=number, label=number % 3, start=number + 7, step=step)
    return keys


@pytest.mark.parametrize(("size", "batch", "steps"), [(8, 4, 5), (7, 3, 9), (5, 5, 3), (10, 1, 4), (3, 2, 1)])
def test_holds_the_newest_keys_with_their_origin(size, batch, steps):
    memory, newest = Memory(2, size, 4), deque(maxlen=size)
    for step in range(steps):
        assert memory.full == (len(newest) == size)
        enqueue(memory, step * batch, batch, step)
        newest.extend((step * batch + i, step) for i in range(batch))
    held = memory.enqueued_at >= 0
    assert int(held.sum()) == len(newest)
    assert sorted(zip(memory.video[held].tolist(), memory.enqueued_at[held].tolist(), strict=True)) == list(newest)
    video = memory.video[held]
    assert torch.equal(memory.features[0, held, 0], video.float())
    assert torch.equal(memory.features[1, held, 3], video.float() + 1000)
    assert torch.equal(memory.source[held], video // 2)
    assert torch.equal(memory.label[held], video % 3)
    assert torch.equal(memory.start[held], video + 7)
    for column in (memory.source, memory.video, memory.label, memory.start):
        assert (column[~held] == -1).all()


def test_random_vectors_are_uniform_directions_and_the_same_for_a_seed():
    features = Memory(2, 3000, 5, seed=7).features
    assert torch.equal(features, Memory(2, 3000, 5, seed=7).features)
    assert not torch.equal(features, Memory(2, 3000, 5, seed=8).features)
    torch.testing.assert_close(features.norm(dim=2), torch.ones(2, 3000))
    units = features.flatten(0, 1).double()  # for uniform directions the mean is 0 and the covariance is 1 / D
    assert units.mean(0).abs().max() < 4 / (5 * 6000) ** 0.5
    assert (units.T @ units / 6000 - torch.eye(5) / 5).abs().max() < 0.02


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_random_vectors_count_as_no_keys(steps):
    """Everything but the vectors themselves is as in a memory that starts empty, until it is full and equal to it."""
    empty, random = Memory(2, 7, 4), Memory(2, 7, 4, seed=0)
    start = random.features.clone()
    for step in range(steps):
        enqueue(empty, step * 3, 3, step)
        enqueue(random, step * 3, 3, step)
    assert random.full == empty.full == (steps >= 3) and random.count == empty.count
    for name in ("source", "video", "label", "start", "enqueued_at"):
        assert torch.equal(getattr(random, name), getattr(empty, name)), name
    written = empty.enqueued_at >= 0
    assert torch.equal(random.features[:, written], empty.features[:, written])
    assert torch.equal(random.features[:, ~written], start[:, ~written])
    assert random.compared.all() and torch.equal(empty.compared, written)
    for column in ("source", "label"):
        ids = getattr(empty, column)
        assert torch.equal(empty.ids(column), ids)
        assert random.ids(column).tolist() == [int(i) if held else -2 for i, held in zip(ids, written, strict=True)]


def test_enqueue_copies():
    memory = Memory(1, 4, 2)
    keys = enqueue(memory, 0, 2, 0).clone()
    before = memory.features.clone()
    keys.zero_()
    assert torch.equal(memory.features, before)


def test_state_goes_on_where_it_was():
    straight, resumed = Memory(2, 7, 4), Memory(2, 7, 4)
    for step in range(4):
        enqueue(straight, step * 3, 3, step)
    resumed.load_state_dict(straight.state_dict())
    for memory in (straight, resumed):
        enqueue(memory, 12, 3, 4)
    for name, value in straight.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state_dict()[name])), name


@pytest.mark.parametrize("shape", [(1, 2, 4), (2, 2, 5), (2, 4)])
def test_keys_of_another_shape_are_named(shape):
    ids = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"keys: expected \[2, B, 4\], got"):
        Memory(2, 7, 4).enqueue(torch.zeros(shape), source=ids, video=ids, label=ids, start=ids, step=0)


def test_a_batch_larger_than_the_memory_is_refused():
    with pytest.raises(ValueError, match=r"at most memory.size = 3 keys at once, got 4"):
        enqueue(Memory(1, 3, 2), 0, 4, 0)


def test_state_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"expected \[2, 7, 4\], got \[2, 8, 4\]"):
        Memory(2, 7, 4).load_state_dict(Memory(2, 8, 4).state_dict())
