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
    pace: Mapping[str, float]  # the typical rms speed of each motion, pixels per tick
    pace_range: Range  # the pace of a source as a share of the typical one
    period: Range  # period of the periodic motions, ticks
    direction: Mapping[str, float]  # the typical direction of a motion, or of its opposite; other motions have none
    direction_spread: float  # largest deviation from it
    figures: tuple[int, int]  # smallest and largest number of figures
    wavelength: Range  # wavelength of the background's pattern, pixels
    figure_wavelength: Range
    tilt: float | None  # largest angle of a pattern to the upright; None: any angle
    hue_spread: float  # full turns: standard deviation of a source's hues around those of its scene
    dark: tuple[Range, Range]  # saturation and value of the darker colour of a pattern
    bright: tuple[Range, Range]
    reversible: bool  # whether a pattern may also be drawn with its two colours exchanged
    drift: Range  # amplitude of the camera's drift
    wave_period: Range  # period of the camera's drift and of the lighting, ticks

    @property
    def fps(self) -> float:
        """Frames per second of the videos."""
        return TICKS / self.step


VERSIONS = {
    # The other versions are not offered. Version 1 (commit 245a41f) drew colour and pace independently of the class.
    # Versions 3 and 4 (8da4eeb, fa9507d) changed the hue of the light within a video and gave each motion two of six
    # scenes; networks learnt little from them.
    2: Version(
        number=2, step=1,
        pace=MappingProxyType({"rotate": 2.3, "shuttle": 1.5, "pulse": 1.0, "orbit": 1.9, "rock": 1.25, "glide": 2.8}),
        pace_range=(0.8, 1.25), period=(12, 24), direction=MappingProxyType({}), direction_spread=math.pi,
        figures=(1, 3), wavelength=(18, 28), figure_wavelength=(8, 15), tilt=None,
        hue_spread=0.05, dark=((0.4, 0.8), (0.2, 0.45)), bright=((0.2, 0.6), (0.65, 1.0)), reversible=True,
        drift=(1.5, 5), wave_period=(50, 150),
    ),
    # Half as many frames per second as version 2, so that computing the flow takes half the time. The number of
    # figures, their periods, the direction of shuttling, the tilt of patterns and the motion of the camera vary less,
    # because InfoNCE learnt to distinguish sources by them before it learnt the class; a period fits into a clip of 16
    # ticks. Hues vary more: networks ignore them because of the augmentation, but the pixel baselines do not.
    5: Version(
        number=5, step=2,
        pace=MappingProxyType(
            {"rotate": 2.4, "shuttle": 1.55, "pulse": 1.0, "orbit": 1.95, "rock": 1.25, "glide": 3.0}
        ),
        pace_range=(0.85, 1.18), period=(12, 18),
        direction=MappingProxyType({"shuttle": math.pi / 2, "glide": 0.0}), direction_spread=0.35,
        figures=(1, 2), wavelength=(22, 30), figure_wavelength=(9.5, 13.5), tilt=0.35,
        hue_spread=0.08, dark=((0.4, 0.8), (0.2, 0.45)), bright=((0.2, 0.6), (0.65, 1.0)), reversible=True,
        drift=(0.5, 2), wave_period=(50, 150),
    ),
}  # fmt: skip
DEFAULT = 2  # the version of all recorded results except those of the quick start


def version_of(number: int) -> Version:
    """Returns the version of this number. Raises InputError if there is none."""
    if number not in VERSIONS:
        raise InputError(f"--version: expected one of {', '.join(map(str, VERSIONS))}, got {number}")
    return VERSIONS[number]
