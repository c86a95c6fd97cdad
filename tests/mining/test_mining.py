"""Mining as a setting: the stage rules, the cascade over a memory, and the effect of equal ids on the loss."""

from __future__ import annotations

import pytest
import torch

from cpr_fast.config import Config, LossConfig, MiningConfig
from cpr_fast.mining.stages import idle_stages, stage_keep, stage_views
from cpr_fast.pretrain.state.cascade import Cascade, mine
from cpr_fast.pretrain.state.memory import Memory
from cpr_fast.pretrain.step.ids import id_meaning


def test_stage_views_end_in_the_other_view_and_alternate():
    assert [stage_views(n) for n in (1, 2, 3, 4, 7)] == [
        (1,),
        (0, 1),
        (1, 0, 1),
        (0, 1, 0, 1),
        (1, 0, 1, 0, 1, 0, 1),
    ]


def test_published_stage_views_start_and_end_in_the_other_view():
    assert [stage_views(n, "coclr") for n in (1, 2, 3, 4, 7)] == [
        (1,),
        (1, 1),
        (1, 0, 1),
        (1, 0, 1, 1),
        (1, 0, 1, 0, 1, 0, 1),
    ]


def test_survivors_of_each_stage():
    assert stage_keep(7, 2048, 0.8, 5) == (1638, 1310, 1048, 838, 671, 536, 5)  # as printed by the published code
    assert stage_keep(7, 2048, 0.5, 5) == (1024, 512, 256, 128, 64, 32, 5)
    assert stage_keep(1, 2048, 0.5, 5) == (5,)
    assert stage_keep(4, 32, 0.5, 10) == (16, 10, 10, 10)  # at least top-k are kept


@pytest.mark.parametrize(
    ("arguments", "idle"),
    [
        ((7, 256, 0.5, 5), [7]),  # 128, 64, 32, 16, 8, 5, 5
        ((7, 384, 0.5, 5), []),  # 192, 96, 48, 24, 12, 6, 5
        ((5, 512, 0.3, 5), [5]),  # 153, 46, 13, 5, 5
        ((3, 8, 0.5, 5), [2, 3]),  # 5, 5, 5
        ((3, 10, 1.0, 5), [1, 2]),
        ((1, 5, 0.5, 5), [1]),
        ((1, 6, 0.5, 5), []),
    ],
)
def test_stages_that_select_nothing(arguments, idle):
    assert idle_stages(stage_keep(*arguments), arguments[1]) == idle


def brute_force(anchors, memory, source, config, top_k):
    """Computes Algorithm 1 by sorting, one query at a time."""
    rows = []
    scores = torch.einsum("vbd,vkd->vbk", anchors.double(), memory.features.double())
    for b in range(anchors.shape[1]):
        left = [k for k in range(memory.size) if memory.source[k] not in (-1, source[b])]
        views = stage_views(config.stages)
        for s, view in enumerate(views, 1):
            left.sort(key=lambda k, view=view, b=b: (-scores[view, b, k].item(), k))
            last = s == len(views)
            left = left[: top_k if last else max(top_k, int(memory.size * config.ratio**s))]
        rows.append(left + [-1] * (top_k - len(left)))
    return torch.tensor(rows)


@pytest.mark.parametrize("stages", [1, 2, 3, 6])
@pytest.mark.parametrize("filled", [9, 40, 100])
def test_cascade_over_the_memory(stages, filled):
    generator = torch.Generator().manual_seed(stages)
    memory = Memory(2, 40, 8)
    # Multiples of 1/4 have exact sums in any order, so even ties are broken in the same way.
    lattice = torch.randint(-4, 5, (2, filled, 8), generator=generator) / 4
    for first in range(0, filled, 10):
        keys = lattice[:, first : first + 10]
        number = torch.arange(first, first + keys.shape[1])
        memory.enqueue(keys, source=number // 3, video=number, label=number % 5, start=number, step=0)
    anchors = torch.randint(-4, 5, (2, 6, 8), generator=generator) / 4
    source = torch.arange(6) * 2 + max(0, filled - 20) // 3
    config = MiningConfig(stages=stages, ratio=0.5)
    mined = mine(anchors, memory, source, Cascade.of(Config(mining=config), memory.size, top_k=7))
    assert torch.equal(mined, brute_force(anchors, memory, source, config, top_k=7))
    siblings = (memory.source[mined.clamp(min=0)] == source[:, None]) & (mined >= 0)
    assert not siblings.any()


def test_infonce_and_the_paper_treat_siblings_as_negatives():
    for mining, protocol in (("none", "paper"), ("none", "coclr"), ("cascade", "paper")):
        meaning = id_meaning(mining, LossConfig(protocol=protocol), seed=0, step=3)
        assert (meaning.ids, meaning.same_id, meaning.self_positive) == ("source", "negative", "keep")


def test_ubernce_takes_equal_labels_as_positives():
    meaning = id_meaning("label", LossConfig(), seed=0, step=3)
    assert (meaning.ids, meaning.same_id, meaning.self_positive) == ("label", "positive", "keep")


@pytest.mark.parametrize("share", [0.0, 0.9, 1.0])
def test_published_drop_of_the_own_key(share):
    loss = LossConfig(protocol="coclr", self_positive_drop=share)
    draws = [id_meaning("cascade", loss, seed=1, step=step).self_positive for step in range(2000)]
    assert draws.count("denominator") / 2000 == pytest.approx(share, abs=0.03)  # 4 standard deviations at a rate of .9
    assert draws == [id_meaning("cascade", loss, seed=1, step=step).self_positive for step in range(2000)]
    assert {id_meaning("cascade", loss, seed=1, step=step).same_id for step in range(9)} == {"positive"}
    if share == 0.9:
        other = [id_meaning("cascade", loss, seed=2, step=step).self_positive for step in range(2000)]
        assert other != draws
