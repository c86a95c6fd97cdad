"""What equal ids mean in the loss of a step: the siblings of a query, or the videos of its class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cpr_fast.config import LossConfig, Mining
from cpr_fast.pretrain.state.schedule import generator

DROP_STREAM = 2  # of `schedule.generator`


@dataclass(frozen=True)
class IdMeaning:
    """What equal ids mean in the loss: the arguments of `mil_nce` of these names."""

    ids: Literal["source", "label"]
    same_id: Literal["positive", "negative"]
    self_positive: Literal["keep", "denominator"]
    averaged: bool = False  # the log-softmax averaged over the positives in place of the MIL form [published UberNCE]


def id_meaning(mining: Mining, loss: LossConfig, *, seed: int, step: int) -> IdMeaning:
    """The reading of ids at a step. Siblings in the memory are negatives [paper, Alg. 1] or positives [published code],
    which also drops q+ from the numerator in a share of the iterations, drawn anew from (seed, step)."""
    if mining == "label":
        return IdMeaning("label", "positive", "keep", averaged=loss.protocol == "coclr")
    if mining == "none" or loss.protocol == "paper":
        return IdMeaning("source", "negative", "keep")
    dropped = generator(seed, DROP_STREAM, step).random() < loss.self_positive_drop
    return IdMeaning("source", "positive", "denominator" if dropped else "keep")
