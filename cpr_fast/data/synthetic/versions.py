"""The versions of the synthetic actions. A set of a version stays reproducible by the version's number.

A version is fixed and committed before any result on it is read, and is never changed afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cpr_fast.errors import InputError

TICKS = 25  # the unit of time of all programmes: ticks per second
Range = tuple[float, float]  # what a value is drawn from, uniformly


@dataclass(frozen=True)
class Version:
    """What distinguishes the versions. Lengths are pixels of a 160x120 frame (they scale with the frame), times ticks,
    angles radians."""

    number: int
    step: int  # ticks between two frames
    diagonals: bool  # two scenes a motion and two motions a scene, or as many of each as the number of classes gives
    pace: Mapping[str, float]  # the typical rms speed of each motion, pixels per tick
    pace_range: Range  # the pace of a source as a share of the typical one
    period: Range  # of the periodic motions
    direction: Mapping[str, float]  # the typical direction of a motion, or of its opposite; other motions have none
    direction_spread: float  # largest deviation from it
    figures: tuple[int, int]  # smallest and largest number of figures
    wavelength: Range  # of the background's pattern
    figure_wavelength: Range
    tilt: float | None  # largest angle of a pattern to the upright; None: any angle
    hue_spread: float  # full turns: standard deviation of a source's hues around those of its scene
    dark: tuple[Range, Range]  # saturation and value of the darker colour of a pattern
    bright: tuple[Range, Range]
    reversible: bool  # whether a pattern may also be drawn with its two colours exchanged
    hue_swing: float  # full turns: amplitude of the change of the light's hue in the course of a source
    drift: Range  # amplitude of the camera's drift
    wave_period: Range  # of the drift and of the light

    @property
    def fps(self) -> float:
        """Frames per second of the videos."""
        return TICKS / self.step


VERSIONS = {
    # 1 drew colour and pace independently of the class; its code is in commit 245a41f. 3 was a first form of 4, on
    # which nothing but a trial was run; its code is in commit 8da4eeb.
    2: Version(
        number=2, step=1, diagonals=False,
        pace=MappingProxyType({"rotate": 2.3, "shuttle": 1.5, "pulse": 1.0, "orbit": 1.9, "rock": 1.25, "glide": 2.8}),
        pace_range=(0.8, 1.25), period=(12, 24), direction=MappingProxyType({}), direction_spread=math.pi,
        figures=(1, 3), wavelength=(18, 28), figure_wavelength=(8, 15), tilt=None,
        hue_spread=0.05, dark=((0.4, 0.8), (0.2, 0.45)), bright=((0.2, 0.6), (0.65, 1.0)), reversible=True,
        hue_swing=0.0, drift=(1.5, 5), wave_period=(50, 150),
    ),
    # What stays the same in a video is what InfoNCE learns. In version 4 this is little more than the class: one figure
    # near the middle, of narrow ranges of sizes, paces and patterns. What changes within a video instead, the hue of
    # the light and the position of the camera, is what raw pixels compare. One view alone gives the class one time in
    # two.
    4: Version(
        number=4, step=2, diagonals=True,
        pace=MappingProxyType(
            {"rotate": 2.4, "shuttle": 1.55, "pulse": 1.0, "orbit": 1.95, "rock": 1.25, "glide": 3.0}
        ),
        pace_range=(0.95, 1.05), period=(14, 16),
        direction=MappingProxyType({"shuttle": math.pi / 2, "glide": 0.0}), direction_spread=0.35,
        figures=(1, 1), wavelength=(24, 28), figure_wavelength=(10.5, 12.5), tilt=0.2,
        hue_spread=0.03, dark=((0.6, 0.8), (0.3, 0.4)), bright=((0.4, 0.6), (0.75, 0.9)), reversible=False,
        hue_swing=0.4, drift=(3, 6), wave_period=(24, 60),
    ),
}  # fmt: skip
DEFAULT = 2  # until results on version 4 are on record: those of README and bench/results are of version 2


def version_of(number: int) -> Version:
    """Returns the version of this number. Raises InputError if there is none."""
    if number not in VERSIONS:
        raise InputError(f"--version: expected one of {', '.join(map(str, VERSIONS))}, got {number}")
    return VERSIONS[number]
