"""The loss of chance that is shown beside a loss is what the loss is when all candidates are equally similar."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.small_runs import settings

from cpr_fast.config import Cycle
from cpr_fast.ops import mil_nce
from cpr_fast.pretrain.step.contrast import chance_loss

K, D = 12, 8


def config(tmp_path, kind="queue", **loss):
    values = settings(tmp_path, loss=loss) if loss else settings(tmp_path)
    return dataclasses.replace(values, memory=dataclasses.replace(values.memory, kind=kind))


@pytest.mark.parametrize(("mining", "top_k"), [("none", 0), ("cascade", 2)])
def test_it_is_the_loss_of_equal_similarities(tmp_path, mining, top_k):
    same = torch.nn.functional.normalize(torch.ones(3, D), dim=1)
    mined = torch.arange(top_k).expand(3, top_k) if top_k else None
    equal = mil_nce(same, same, same[:1].expand(K, D).contiguous(), mined, temperature=0.07).item()
    assert chance_loss(config(tmp_path), Cycle(view="rgb", epochs=1, mining=mining), K, top_k) == pytest.approx(
        equal, abs=1e-5
    )


def test_entries_of_the_querys_own_video_are_no_candidates(tmp_path):
    cycle = Cycle(view="rgb", epochs=1, mining="none")
    found = [chance_loss(config(tmp_path, kind), cycle, K, 0) for kind in ("queue", "bank", "batch")]
    assert found == pytest.approx([math.log(13), math.log(12), math.log(11)])


def test_it_is_unknown_where_the_number_of_positives_differs(tmp_path):
    cycle = Cycle(view="rgb", epochs=1, mining="label")
    assert chance_loss(config(tmp_path, protocol="paper"), cycle, K, 0) is None
    assert chance_loss(config(tmp_path, protocol="coclr"), cycle, K, 0) == pytest.approx(math.log(13))
