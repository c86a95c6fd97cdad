"""Sources of synthetic actions: textured figures in a scene, moved by a programme and filmed by a camera.

A *source* is one continuous shot; a *clip* is the part of it from one time to another. Everything that moves is a
closed-form function of time. Therefore clips that are cut from one source at different times share textures, colours,
figures and the parameters of the programme, and differ in phase, camera position, lighting and noise.

Letters: T frames, H x W pixels, S side of the box that a figure is drawn in. Lengths are pixels of a 160x120 frame
(they scale with the frame), times are ticks of 1/25 second, angles are radians.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cpr_fast.data.synthetic.motions import MOTIONS, Array, Motion, Pose
from cpr_fast.data.synthetic.scenes import FIGURE_HUE, GROUND_HUE, OUTLINES, SCENES, scene_texture
from cpr_fast.data.synthetic.versions import Version


@dataclass(frozen=True)
class Figure:
    """A textured figure of a source, and how it moves."""

    texture: Array  # float32 [S, S, 4]: colour times alpha in 0..255, and alpha in 0..1; the border is transparent
    reach: float  # pixels: the largest distance from the centre at which the figure is drawn
    position: Callable[[Array], tuple[Array, Array]]  # time [T] -> centre x, y [T] in the scene, without the programme
    programme: Callable[[Array], Pose]


@dataclass(frozen=True)
class Wave:
    """A slow sum of two sines of time, in -1..1, for camera drift and lighting."""

    periods: tuple[float, float]  # ticks
    phases: tuple[float, float]

    def __call__(self, time: Array) -> Array:
        return sum(0.5 * np.sin(2 * math.pi * time / p + q) for p, q in zip(self.periods, self.phases, strict=True))


@dataclass(frozen=True)
class Source:
    """One continuous shot: what its clips share."""

    height: int
    width: int
    background: Array  # float32 [H + 2 margin, W + 2 margin, 3]
    margin: int
    figures: tuple[Figure, ...]  # in drawing order; the distractors are behind
    drift: float  # pixels: amplitude of the camera's drift along x and y
    camera: tuple[Wave, Wave]
    light: Wave
    flicker: float  # share: amplitude of the lighting change
    shade: Array  # float32 [H, W, 1]: fixed fall-off of the light across the frame
    noise: float  # standard deviation of the sensor noise, in 0..255
    step: int  # ticks between two frames


def make_source(
    motion: str, scene: str, rng: np.random.Generator, *, height: int, width: int, version: Version
) -> Source:
    """Draws one source of the class (motion, scene). All random values come from `rng`."""
    unit = min(height, width) / 120
    drift = unit * rng.uniform(*version.drift)
    margin = math.ceil(drift) + 2
    wavelength = unit * rng.uniform(*version.wavelength)
    size = height + 2 * margin, width + 2 * margin
    background = scene_texture(scene, GROUND_HUE[scene], *size, wavelength, rng, version)
    distractors = [_distractor(rng, height, width, version) for _ in range(rng.integers(1, 3))]
    angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.2)
    x, y = np.linspace(-1, 1, width)[None, :], np.linspace(-1, 1, height)[:, None]
    shade = 1 + slope * (math.cos(angle) * x + math.sin(angle) * y)
    return Source(
        height=height,
        width=width,
        background=background,
        margin=margin,
        figures=(*distractors, *_performers(motion, scene, rng, height, width, version)),
        drift=drift,
        camera=(_wave(rng, version), _wave(rng, version)),
        light=_wave(rng, version),
        flicker=rng.uniform(0.02, 0.15),
        shade=shade.astype(np.float32)[..., None],
        noise=rng.uniform(1, 4),
        step=version.step,
    )


def _wave(rng: np.random.Generator, version: Version) -> Wave:
    return Wave(tuple(rng.uniform(*version.wave_period, 2)), tuple(rng.uniform(0, 2 * math.pi, 2)))


def _performers(
    motion: str, scene: str, rng: np.random.Generator, height: int, width: int, version: Version
) -> list[Figure]:
    """Draws the figures, side by side and of one pace; texture, direction, sense and phase differ."""
    unit = min(height, width) / 120
    count = int(rng.integers(version.figures[0], version.figures[1] + 1))
    speed = unit * version.pace[motion] * rng.uniform(*version.pace_range)
    period = rng.uniform(*version.period)
    places = (rng.permutation(count) + rng.uniform(0.35, 0.65, count)) / count * width
    figures = []
    for x in places:
        radius = unit * rng.uniform(*((26, 34), (20, 26), (16, 20))[count - 1])
        y = height * rng.uniform(0.35, 0.65)
        direction, phase = rng.uniform(0, 2 * math.pi, 2)
        if motion in version.direction:
            spread = rng.uniform(-version.direction_spread, version.direction_spread)
            direction = version.direction[motion] + spread + rng.choice((0, math.pi))
        parameters = Motion(speed, period, radius, direction, rng.choice((-1.0, 1.0)), phase)
        figures.append(
            Figure(
                texture=_figure_texture(scene, radius, unit * rng.uniform(*version.figure_wavelength), rng, version),
                reach=radius * (math.exp(0.5) if motion == "pulse" else 1),
                position=lambda time, x=x, y=y: (np.full(len(time), x), np.full(len(time), y)),
                programme=lambda time, parameters=parameters: MOTIONS[motion](parameters, time),
            )
        )
    return figures


def _distractor(rng: np.random.Generator, height: int, width: int, version: Version) -> Figure:
    """Draws a small figure of any kind of scene that follows no programme: it drifts straight and turns back at the
    edges."""
    unit = min(height, width) / 120
    radius = unit * rng.uniform(8, 14)
    (dx, dy), (x0, y0) = unit * rng.uniform(-0.6, 0.6, 2), rng.uniform(0, 2, 2)

    def position(time: Array) -> tuple[Array, Array]:
        x, y = (x0 + dx * time / width) % 2, (y0 + dy * time / height) % 2
        return width * np.abs(x - 1), height * np.abs(y - 1)

    texture = _figure_texture(
        str(rng.choice(SCENES)), radius, unit * rng.uniform(*version.figure_wavelength), rng, version
    )
    return Figure(texture, radius, position, lambda time: Pose())


def _figure_texture(scene: str, radius: float, wavelength: float, rng: np.random.Generator, version: Version) -> Array:
    """Returns the pattern of the scene, cut to the outline of the scene, float32 [S, S, 4]."""
    half = math.ceil(radius * 1.2) + 2
    x = np.arange(-half, half + 1.0)[None, :] / radius
    y = np.arange(-half, half + 1.0)[:, None] / (radius * rng.uniform(0.75, 1.0))
    distance = np.hypot(x, y)
    outline = np.minimum(OUTLINES[scene](np.arctan2(y, x)), 1.1)
    alpha = np.clip(radius * (outline - distance) + 0.5, 0, 1)[..., None].astype(np.float32)
    colour = scene_texture(scene, FIGURE_HUE[scene], 2 * half + 1, 2 * half + 1, wavelength, rng, version)
    return np.concatenate([colour * alpha, alpha], axis=2)
