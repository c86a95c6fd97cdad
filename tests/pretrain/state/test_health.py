"""Compares measures of collapse and of a stale memory with float64 and a simple record of keys; tests alarms and
rows.
"""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from support.small_runs import ALONE, rows, run, settings
from support.stand_in_loader import RandomLoader, make_index
from torch.nn import functional as F

from cpr_fast.config import Cycle, HealthConfig
from cpr_fast.pretrain.state.cycle import CycleState
from cpr_fast.pretrain.state.health import WINDOW, Health, effective_rank, feature_std
from cpr_fast.pretrain.state.memory import Memory
from cpr_fast.pretrain.step.step import train_step

pytestmark = pytest.mark.usefixtures("one_thread")


def directions(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_spread_of_uniform_directions_is_one_and_of_one_point_zero():
    features = directions(4000, 24)
    assert feature_std(features).item() == pytest.approx(1, abs=0.01)
    assert feature_std(directions(1, 24).expand(50, -1)).item() == pytest.approx(0, abs=1e-6)
    units = features.double().numpy() / np.linalg.norm(features.double().numpy(), axis=1, keepdims=True)
    assert feature_std(3 * features).item() == pytest.approx(units.std(axis=0).mean() * math.sqrt(24), rel=1e-5)


def test_effective_rank_counts_directions():
    basis = torch.linalg.qr(directions(33, 33))[0]
    for rank in (1, 5, 33):
        assert effective_rank(basis[:rank].repeat(3, 1)).item() == pytest.approx(rank, rel=1e-4)
    features = directions(71, 19).double()
    values = np.linalg.svd(F.normalize(features, dim=1).numpy(), compute_uv=False)
    shares = values / values.sum()
    assert effective_rank(features).item() == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)


@pytest.mark.parametrize("sizes", [(7, 30, 1), (1000, 37, 5), (WINDOW + 3, 11), (5, 3 * WINDOW)])
def test_the_newest_queries_count(sizes):
    health = Health(["rgb", "residual"], Memory(1, 4, 6), videos=9, drifts=False)
    batches = [directions(2, size, 6, seed=size) for size in sizes]
    for batch in batches:
        health.update(batch, batch[0], torch.zeros(batch.shape[1], dtype=torch.int64))
    newest = torch.cat(batches, dim=1)[:, -WINDOW:].double()
    row = health.summary(0)
    for view, features in zip(("rgb", "residual"), newest, strict=True):
        assert row["feature_std"][view] == pytest.approx(feature_std(features).item(), rel=1e-9)
        assert row["effective_rank"][view] == pytest.approx(effective_rank(features).item(), rel=1e-9)


def test_random_vectors_have_no_age_and_no_drift(tmp_path):
    """With a queue of 31, a third of it is random after the first epoch, in which every video has its first key."""
    index = make_index(videos=18)
    state = CycleState(settings(tmp_path, memory={"size": 31}), Cycle("rgb", 1, "none"), {}, index, ALONE)
    for step, batch in enumerate(RandomLoader(index, state.config.data, state.views, seed=0).epoch(0)):
        train_step(state, batch, step)
    row = state.health.summary(2)
    assert not state.memory.full and row["memory_drift"] is None
    assert row["memory_age_steps"] == pytest.approx((2 + 1 + 0) / 3)


@pytest.mark.parametrize("size", [10, 31])  # lengths of the queue: shorter and longer than an epoch of 18 videos
def test_drift_is_the_distance_to_the_newest_key_held(tmp_path, size):
    index = make_index(videos=18)
    config = settings(tmp_path, memory={"size": size})
    state = CycleState(config, Cycle("rgb", 3, "none"), {}, index, ALONE)
    loader = RandomLoader(index, config.data, state.views, seed=0)
    held: list[tuple[int, torch.Tensor]] = []  # the newest comes last
    step = 0
    for epoch in range(3):
        distances = []
        for batch in loader.epoch(epoch):
            result = train_step(state, batch, step)
            for video, key in zip(result.video.tolist(), result.keys[0], strict=True):
                before = [old for old_video, old in held if old_video == video]
                if before:
                    distances.append(1 - (before[-1].double() @ key.double()).item())
            held = (held + list(zip(result.video.tolist(), result.keys[0], strict=True)))[-size:]
            step += 1
        row = state.health.summary(step - 1)
        state.start_epoch()
        if epoch == 0:
            assert row["memory_drift"] is None
        else:
            assert distances and row["memory_drift"] == pytest.approx(np.mean(distances), abs=1e-6)
        ages = [(step - 1) - (step * 6 - 1 - i) // 6 for i in range(min(size, step * 6))]  # 6 keys a step
        assert row["memory_age_steps"] == pytest.approx(np.mean(ages))


@pytest.mark.parametrize("kind", ["bank", "batch"])
def test_other_memories_have_no_drift(tmp_path, kind):
    config = settings(tmp_path, memory={"kind": kind})
    for row in rows(run(config), "health"):
        assert row["memory_drift"] is None
        assert row["memory_age_steps"] == (1.0 if kind == "bank" else 0.0)  # every video once in three steps
        assert set(row["feature_std"]) == set(row["effective_rank"]) == {row["view"]}


def test_a_shared_encoder_is_watched_in_both_views(tmp_path):
    cycles = [{"view": "rgb", "epochs": 2, "mining": "cascade", "other": "residual"}]
    config = settings(tmp_path, memory={"kind": "bank"}, model={"shared": True}, schedule={"cycles": cycles},
                      loss={"intra_negatives": "repeat"})  # fmt: skip
    for row in rows(run(config), "health"):
        assert set(row["feature_std"]) == {"rgb", "residual"}
        assert all(1 <= rank <= 8 for rank in row["effective_rank"].values())


def test_a_collapse_raises_one_alarm_until_it_recovers():
    bounds = HealthConfig()
    health = Health(["flow"], Memory(1, 4, 16), videos=900, drifts=False)

    def epoch(queries: torch.Tensor) -> list[str]:
        health.update(queries[None], queries, torch.zeros(len(queries), dtype=torch.int64))
        return health.alarms(health.summary(0), bounds)

    assert epoch(directions(WINDOW, 16)) == []
    point = directions(1, 16) + 1e-3 * directions(WINDOW, 16)
    texts = epoch(point)
    assert [text.split(": ")[0] for text in texts] == [
        "the flow queries are nearly one point", "the flow queries use few dimensions",
    ]  # fmt: skip
    assert texts[1].endswith(" is below health.min_effective_rank 4.0")
    assert epoch(point) == []
    assert epoch(directions(2, 16)) == []  # two good queries do not end the alarm, and two bad ones would not raise it
    assert epoch(directions(WINDOW, 16)) == []
    assert len(epoch(point)) == 2


@pytest.mark.parametrize(("queries", "videos", "limit"), [(8, 900, 1), (40, 20, 2.5), (32, 900, 4), (2000, 900, 4)])
def test_few_queries_may_use_few_dimensions(queries, videos, limit):
    """N queries span at most N dimensions, so the limit grows with their number, up to the setting."""
    health = Health(["rgb"], Memory(1, 4, 64), videos=videos, drifts=False)
    health.update(directions(queries, 64)[None], directions(queries, 64), torch.zeros(queries, dtype=torch.int64))
    row = health.summary(0)
    said = f"{limit:.3g}, an eighth of the {row['queries']} videos" if limit < 4 else "health.min_effective_rank 4.0"
    for rank in (limit - 0.01, limit):
        alarms = health.alarms(row | {"effective_rank": {"rgb": rank}}, HealthConfig())
        assert alarms == ([] if rank == limit else [
            f"the rgb queries use few dimensions: effective_rank {rank:.3g} is below {said}"])  # fmt: skip


def test_alarms_are_rows_and_warnings(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    # No queries spread more than uniformly, and no two clips have equal keys: both measures are always out of bounds.
    folder = run(settings(tmp_path, health={"min_feature_std": 1.5, "max_memory_drift": 1e-6}))
    alarms = rows(folder, "alarm")
    # Alarms are reset in each cycle; the drift is measured from its second epoch on.
    assert [(row["epoch"], row["view"], row["text"].split(":")[1].split()[0]) for row in alarms] == [
        (0, "rgb", "feature_std"), (1, "rgb", "memory_drift"), (2, "flow", "feature_std"),
        (3, "flow", "memory_drift"),
    ]  # fmt: skip
    for row in alarms:
        assert f"epoch {row['epoch'] + 1} of 4: {row['text']}" in caplog.text
