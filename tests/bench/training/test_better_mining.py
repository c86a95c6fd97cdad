"""Other ways to mine than the paper's: each selects what it is registered to select, by a brute force in float64."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support import small_runs
from support.stand_in_loader import RandomLoader
from torch.nn import functional as F

from cpr_fast.ops import mil_nce

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench" / "training"))
from evidence import better_mining as ways
from evidence import runs

POSITIVES, ENTRIES, QUERIES = 3, 40, 11


def unit(*shape, seed=0):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=-1).float()


@pytest.fixture
def mined():
    """Slots with padding, sources of the queries and of the entries (some slots empty), and features."""
    draw = torch.Generator().manual_seed(1)
    slots = torch.stack([torch.randperm(ENTRIES, generator=draw)[: 4 * POSITIVES] for _ in range(QUERIES)])
    slots[0, 5:], slots[1] = -1, -1
    sources = torch.randint(0, 9, (ENTRIES,), generator=draw)
    sources[::7] = -1
    return (
        slots,
        torch.randint(0, 9, (QUERIES,), generator=draw),
        sources,
        unit(2, QUERIES, 6),
        unit(2, ENTRIES, 6, seed=2),
    )


def padded(rows, width):
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def test_mutual_neighbours(mined):
    slots, source, sources, anchors, features = mined
    for view, factor in ((0, 1), (1, 2)):
        found = ways.mutual(slots[:, :POSITIVES], anchors, features, source, sources, view, factor)
        expected = []
        for query, row in enumerate(slots[:, :POSITIVES].tolist()):
            left = []
            for slot in row:
                if slot < 0:
                    continue
                others = [k for k in range(ENTRIES) if sources[k] >= 0 and sources[k] != sources[slot]]
                near = sorted((float(features[view, slot] @ features[view, k]) for k in others), reverse=True)
                if float(anchors[view, query] @ features[view, slot]) >= near[factor * POSITIVES - 1]:
                    left.append(slot)
            expected.append(left)
        assert torch.equal(found, padded(expected, POSITIVES))
        assert 0 < sum(map(len, expected)) < (slots[:, :POSITIVES] >= 0).sum()


def test_what_siblings_agree_on(mined):
    slots, source, sources, _, _ = mined
    draw = torch.Generator().manual_seed(3)
    of_entries = torch.stack([torch.randperm(ENTRIES, generator=draw)[:25] for _ in range(ENTRIES)])
    of_entries[5, 3:] = -1
    found = ways.agreed(slots, of_entries, source, sources, POSITIVES)
    expected = []
    for query, row in enumerate(slots.tolist()):
        siblings = [set(of_entries[k].tolist()) for k in range(ENTRIES) if sources[k] == source[query]]
        left = [s for s in row if s >= 0 and 2 * sum(s in sibling for sibling in siblings) >= len(siblings)]
        expected.append(left[:POSITIVES])
    assert torch.equal(found, padded(expected, POSITIVES))


def test_weights(mined):
    slots, source, sources, anchors, features = mined
    slots, query = slots[:, :POSITIVES], anchors[0].clone().requires_grad_()
    own = unit(QUERIES, 6, seed=5)
    equal = torch.zeros(slots.shape)
    loss = ways.weighted_mil_nce(query, own, features[0], slots, equal, 0.07)
    torch.testing.assert_close(loss, mil_nce(query, own, features[0], slots, temperature=0.07))
    log_weights = torch.randn(slots.shape, generator=torch.Generator().manual_seed(6))
    loss = ways.weighted_mil_nce(query, own, features[0], slots, log_weights, 0.07)
    expected = []
    for b in range(QUERIES):
        entries = [float((anchors[0, b].double() @ e.double() / 0.07).exp()) for e in features[0]]
        self_term = float((anchors[0, b].double() @ own[b].double() / 0.07).exp())
        there = [
            (s, w) for s, w in zip(slots[b].tolist(), log_weights[b].double().exp().tolist(), strict=True) if s >= 0
        ]
        numerator = self_term + sum(w * entries[s] for s, w in there)
        expected.append(torch.tensor((self_term + sum(entries)) / numerator).log())
    torch.testing.assert_close(loss.double(), torch.stack(expected).mean().double(), rtol=1e-5, atol=1e-6)


# ---- in a run ------------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setattr(ways, "_videos", lambda state: small_runs.INDEX)
    monkeypatch.setattr(ways, "TrainLoader", RandomLoader)


def run(out, way=None, **sections):
    with way.in_force() if way else nullcontext():
        return small_runs.run(small_runs.settings(out, **sections))


def test_without_a_change_a_run_is_the_papers(tmp_path):
    paper, same = run(tmp_path / "paper"), run(tmp_path / "same", ways.Way())
    small_runs.assert_same(small_runs.everything(paper), small_runs.everything(same))


@pytest.mark.parametrize("groups", [1, 2])
def test_backbone_features_are_the_keys_of_a_head_that_only_normalises(tmp_path, groups):
    sections = {"model": {"head": "unit", "feature_dim": 32}, "memory": {"size": 10, "shuffle_bn_groups": groups}}
    paper, same = run(tmp_path / "paper", **sections), run(tmp_path / "same", ways.BackboneFeatures(), **sections)
    small_runs.assert_same(small_runs.everything(paper), small_runs.everything(same))


def test_backbone_features_of_another_head_mine_otherwise(tmp_path):
    paper, other = run(tmp_path / "paper"), run(tmp_path / "other", ways.BackboneFeatures())
    with pytest.raises(AssertionError):
        small_runs.assert_same(small_runs.trained(paper), small_runs.trained(other))


SHARED = {
    "model": {"shared": True},
    "memory": {"kind": "bank"},
    "schedule": {"cycles": [{"view": "rgb", "epochs": 3, "milestones": [2], "other": "residual"}]},
}


@pytest.mark.parametrize("sections", [{}, SHARED], ids=["queue", "shared"])
def test_only_entries_of_the_querys_class_are_left_of_what_is_mined(tmp_path, sections):
    counts = []

    class Checked(ways.OnlyRight):
        def mine(self, anchors, memory, source, cascade):
            found = super().mine(anchors, memory, source, cascade)
            all_mined = ways.Way.mine(self, anchors, memory, source, cascade)
            for label, left, row in zip(self.label.tolist(), found.tolist(), all_mined.tolist(), strict=True):
                right = [slot for slot in row if slot >= 0 and memory.label[slot] == label]
                assert left == right + [-1] * (len(row) - len(right))
                counts.append((len(right), len(row)))
            return found

    run(tmp_path / "run", Checked(), **sections)
    assert 0 < sum(right for right, _ in counts) < sum(all_mined for _, all_mined in counts)


def test_past_views_are_averages_of_all_keys_of_a_video(tmp_path):
    averages, compared = {}, []

    class Checked(ways.PastViews):
        def write(self, slots, keys, video):
            super().write(slots, keys, video)
            for row, number in enumerate(video.tolist()):
                averages[number] = mixed(keys[:, row], number)

        @staticmethod
        def select(anchors, entries, memory, source, views, keep):
            expected = torch.stack([averages[number] for number in memory.video.tolist()], dim=1)
            torch.testing.assert_close(entries, expected)
            compared.append(anchors)
            return ways.Way.select(anchors, entries, memory, source, views, keep)

        def mine(self, anchors, memory, source, cascade):
            expected = [mixed(anchors[:, row], number) for row, number in enumerate(self.video.tolist())]
            mined = super().mine(anchors, memory, source, cascade)
            torch.testing.assert_close(compared[-1], torch.stack(expected, dim=1))
            return mined

    def mixed(key, number):
        return F.normalize(0.5 * key + 0.5 * averages[number], dim=1) if number in averages else key

    run(tmp_path / "run", Checked(), schedule={"cycles": [{"view": "flow", "epochs": 4}]})
    assert len(compared) == 4 * 3 - 2


def test_a_warm_start_loses_no_step(tmp_path):
    paper, warm = run(tmp_path / "paper"), run(tmp_path / "warm", ways.WarmStart())
    steps = [[row["learning_steps"] for row in small_runs.rows(out, "epoch")] for out in (paper, warm)]
    assert steps == [[3, 3, 1, 3], [3, 3, 3, 3]]


@pytest.mark.parametrize("name", ways.WAYS)
def test_every_way_trains_and_repeats_itself(tmp_path, name):
    first, again = (run(tmp_path / str(i), ways.WAYS[name]()) for i in range(2))
    small_runs.assert_same(small_runs.trained(first), small_runs.trained(again))
    assert all(row["loss"] > 0 for row in small_runs.rows(first, "epoch"))


def test_a_stopped_run_of_a_way_begins_again(tmp_path, monkeypatch):
    """Its features are in no checkpoint. A run that has ended stays."""

    def pretrain(config, resume, progress):
        return small_runs.run(config)

    monkeypatch.setattr(runs, "pretrain", pretrain)
    out = small_runs.stopped(tmp_path / "run", (3, 1))
    config = small_runs.settings(out)
    runs._train(config, "past_views")
    small_runs.assert_same(small_runs.trained(out), small_runs.trained(run(tmp_path / "whole", ways.PastViews())))
    monkeypatch.setattr(runs, "pretrain", lambda config, resume, progress: None)
    runs._train(config, "past_views")
    assert small_runs.trained(out)["epoch"] == 4
