"""What one training step returns; everything stays on the device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """What a step leaves on the device. B clips per rank, R ranks, P positives.

    loss: 0-d float32, NaN while the memory is not yet full.
    rates: {name: 0-d float32} of what was mined, means over the queries of all ranks; empty where nothing was.
    finite: 0-d bool, no feature and no loss is NaN or infinite.
    video, start: [R*B] int64 of the key clips.
    queries, keys: [L, R*B, D] of the L views that learn, [V, R*B, D].
    mined_video, mined_start: [R*B, P] int64, -1 = padding, or None.
    """

    loss: Tensor
    rates: dict[str, Tensor]
    finite: Tensor
    video: Tensor
    start: Tensor
    queries: Tensor
    keys: Tensor
    mined_video: Tensor | None = None
    mined_start: Tensor | None = None
