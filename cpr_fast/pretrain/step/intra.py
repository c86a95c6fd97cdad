"""Intra-negatives: clips without their motion, used as negatives so that appearance alone cannot solve the task [IIC,
section 3.3].

Letters: B clips per rank, R ranks, T frames.
"""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cpr_fast.config import QUARTERS
from cpr_fast.pretrain.state.schedule import generator, on_device
from cpr_fast.runtime.distributed import World

INTRA_STREAM = 3  # argument `stream` of `schedule.generator`


def without_motion(clips: Tensor, how: Literal["repeat", "shuffle"], *, seed: int, step: int, world: World) -> Tensor:
    """Returns this rank's clips [B, 3, T, H, W] without their motion.

    Args:
        how: "repeat": one random frame of each clip replaces all of its frames. "shuffle": two random quarters of its
            frames are exchanged.
        seed, step: determine the draws, together with the position of a clip in the batch of all ranks.
    """
    count = len(clips)
    draws = generator(seed, INTRA_STREAM, step).random(world.size * count)  # [R*B] in 0..1
    frames = on_device(_frames(draws[world.rank * count :][:count], clips.shape[2], how), clips.device)
    return torch.gather(clips, 2, frames[:, None, :, None, None].expand_as(clips))


def _frames(draws: np.ndarray, frames: int, how: str) -> np.ndarray:
    """Returns the frame to take at each position of a clip, [B, T] int64."""
    if how == "repeat":
        return np.repeat((draws[:, None] * frames).astype(np.int64), frames, axis=1)
    quarters = np.array_split(np.arange(frames), QUARTERS)
    pairs = list(itertools.combinations(range(QUARTERS), 2))
    return np.stack([_exchanged(quarters, *pairs[int(draw * len(pairs))]) for draw in draws])


def _exchanged(quarters: list[np.ndarray], first: int, second: int) -> np.ndarray:
    order = list(quarters)
    order[first], order[second] = order[second], order[first]
    return np.concatenate(order)
