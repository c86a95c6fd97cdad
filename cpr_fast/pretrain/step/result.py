"""The result of one training step; all tensors stay on the device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """The result of a step, on the device. B clips per rank, R ranks, L views that learn, V views, P positives.

    Attributes:
        loss: 0-d float32; NaN in a step that only fills the queue.
        rates: {name: 0-d float32}, mining rates averaged over the queries of all ranks; empty if nothing was mined.
        finite: 0-d bool, whether all features and the loss are finite.
        video, start, plan: [R*B] int64, video and first source frame of the key clips, and the digest of the plan of
            their video (see `Batch`).
        queries, keys: [L, R*B, D] and [V, R*B, D] float32 features.
        mined, mined_video, mined_start: [R*B, P] int64, slots of the memory, and video and start of their clips before
            this step's keys were written; -1 = padding; None if nothing was mined.
        grad_norm: 0-d float32, norm of the gradient before it was limited; None without optim.clip_norm.
    """

    loss: Tensor
    rates: dict[str, Tensor]
    finite: Tensor
    video: Tensor
    start: Tensor
    plan: Tensor
    queries: Tensor
    keys: Tensor
    mined: Tensor | None = None
    mined_video: Tensor | None = None
    mined_start: Tensor | None = None
    grad_norm: Tensor | None = None
