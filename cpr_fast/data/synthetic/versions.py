"""The versions of the synthetic actions. A set of a version stays reproducible by the version's number.

A version is fixed and committed before any result on it is read, and is never changed afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cpr_fast.errors import InputError

TICKS = 25  # the unit of time of all programmes: ticks per second


@dataclass(frozen=True)
class Version:
    """What distinguishes the versions. Lengths are pixels of a 160x120 frame (they scale with the frame), times ticks.

    `pace` is the typical rms speed of each motion, in pixels per tick; the pace of a source is `pace_range` times this.
    """

    number: int
    step: int  # ticks between two frames
    diagonals: bool  # two scenes a motion and two motions a scene, or as many of each as the number of classes gives
    pace: Mapping[str, float]
    pace_range: tuple[float, float]
    period: tuple[float, float]  # of the periodic motions
    wavelength: tuple[float, float]  # of the background's pattern
    tilt: float | None  # radians: largest angle of a pattern to the upright; None: any angle
    hue_swing: float  # full turns: amplitude of the change of the light's hue in the course of a source

    @property
    def fps(self) -> float:
        return TICKS / self.step


def _paces(**pace: float) -> Mapping[str, float]:
    return MappingProxyType(pace)


VERSIONS = {
    # 1 drew colour and pace independently of the class; its code is in commit 245a41f.
    2: Version(
        number=2, step=1, diagonals=False,
        pace=_paces(rotate=2.3, shuttle=1.5, pulse=1.0, orbit=1.9, rock=1.25, glide=2.8),
        pace_range=(0.8, 1.25), period=(12, 24), wavelength=(18, 28), tilt=None, hue_swing=0.0,
    ),
    # One view alone gives the class one time in two. Motions are farther apart in pace and their periods fit into a
    # clip of 16 ticks. Colour, which is the same all over a version-2 video and is most of what raw pixels give away,
    # changes within a video; the angle of a pattern, which told sources apart, hardly differs.
    3: Version(
        number=3, step=2, diagonals=True,
        pace=_paces(rotate=2.4, shuttle=1.55, pulse=1.0, orbit=1.95, rock=1.25, glide=3.0),
        pace_range=(0.85, 1.18), period=(12, 18), wavelength=(22, 30), tilt=0.35, hue_swing=0.25,
    ),
}  # fmt: skip
NEWEST = max(VERSIONS)


def version_of(number: int) -> Version:
    """Returns the version of this number. Raises InputError if there is none."""
    if number not in VERSIONS:
        raise InputError(f"--version: expected one of {', '.join(map(str, VERSIONS))}, got {number}")
    return VERSIONS[number]
