"""The motion programmes of synthetic actions: the pose of a figure as a closed-form function of time.

Lengths are pixels of a 160x120 frame (they scale with the frame), times are ticks of 1/25 second, angles are radians.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Motion(NamedTuple):
    """The parameters of one figure's programme. `speed` is the rms speed over the figure and over time."""

    speed: float  # pixels per tick
    period: float  # ticks
    radius: float  # pixels, the size of the figure
    direction: float
    sign: float
    phase: float


class Pose(NamedTuple):
    """Displacement, rotation and logarithm of the scale at each time [T]; a plain 0.0 where a programme does not change
    one of them."""

    dx: Array | float = 0.0
    dy: Array | float = 0.0
    angle: Array | float = 0.0
    log_scale: Array | float = 0.0


def _swing(motion: Motion, time: Array, lever: float, limit: float) -> Array:
    """Returns a sine [T] whose rms rate of change times `lever` is the speed. Where its amplitude would exceed `limit`,
    the period is shortened instead.
    """
    amplitude = min(limit, math.sqrt(2) * motion.speed * motion.period / (2 * math.pi * lever))
    rate = math.sqrt(2) * motion.speed / (amplitude * lever)
    return amplitude * np.sin(rate * time + motion.phase)


def _rotate(motion: Motion, time: Array) -> Pose:
    return Pose(angle=motion.phase + motion.sign * motion.speed / (0.7 * motion.radius) * time)


def _shuttle(motion: Motion, time: Array) -> Pose:
    along = _swing(motion, time, lever=1.0, limit=math.inf)
    return Pose(along * math.cos(motion.direction), along * math.sin(motion.direction))


def _pulse(motion: Motion, time: Array) -> Pose:
    return Pose(log_scale=_swing(motion, time, lever=0.7 * motion.radius, limit=0.5))


def _orbit(motion: Motion, time: Array) -> Pose:
    radius = motion.speed * motion.period / (2 * math.pi)
    turn = motion.phase + motion.sign * 2 * math.pi / motion.period * time
    return Pose(radius * np.cos(turn), radius * np.sin(turn))


def _rock(motion: Motion, time: Array) -> Pose:
    return Pose(angle=motion.direction + _swing(motion, time, lever=0.7 * motion.radius, limit=0.8))


def _glide(motion: Motion, time: Array) -> Pose:
    along = motion.speed * time
    return Pose(along * math.cos(motion.direction), along * math.sin(motion.direction))


# The motion programmes: turn in place, swing back and forth along a line, grow and shrink, move along a circle without
# turning, rock in place, cross the frame. The mean flow of the periodic ones is zero, because they return to where they
# started.
MOTIONS: dict[str, Callable[[Motion, Array], Pose]] = {
    "rotate": _rotate,
    "shuttle": _shuttle,
    "pulse": _pulse,
    "orbit": _orbit,
    "rock": _rock,
    "glide": _glide,
}
