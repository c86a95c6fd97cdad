"""What equal ids mean in the loss: whether the siblings of a query, or the videos of its class, are positives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cpr_fast.config import LossConfig, Mining
from cpr_fast.pretrain.state.schedule import generator

DROP_STREAM = 2  # argument `stream` of `schedule.generator`


@dataclass(frozen=True)
class IdMeaning:
    """Arguments of `mil_nce`: which ids are compared, and what an equal id means."""

    ids: Literal["source", "label"]
    same_id: Literal["positive", "negative"]
    self_positive: Literal["keep", "denominator"]
    averaged: bool = False  # average the log-softmax over the positives, instead of the MIL form [published UberNCE]


def id_meaning(mining: Mining, loss: LossConfig, *, seed: int, step: int) -> IdMeaning:
    """Returns what equal ids mean at a step.

    Siblings in the memory are negatives [paper, Alg. 1] or positives [published code]. The published code also drops q+
    from the numerator in a random share of the steps; the draw depends on (seed, step).
    """
    if mining == "label":
        return IdMeaning("label", "positive", "keep", averaged=loss.protocol == "coclr")
    if mining == "none" or loss.protocol == "paper":
        return IdMeaning("source", "negative", "keep")
    dropped = generator(seed, DROP_STREAM, step).random() < loss.self_positive_drop
    return IdMeaning("source", "positive", "denominator" if dropped else "keep")
