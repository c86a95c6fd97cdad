"""What a synthetic action looks like: textured figures in a scene, moved by a programme, filmed by a camera.

A *source* is one continuous take; a *clip* is the stretch of it from one time to another. Everything that moves is a
closed function of the time, so clips cut from one source at different times share texture, colours, figures and the
programme's parameters, and differ in phase, camera position, lighting and noise.

Letters: T frames, H x W pixels, n side of the box a figure is drawn in. Lengths are pixels of a 160x120 frame (they
scale with the frame), times are frames at 25 per second, angles radians.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

CHUNK = 8  # frames drawn at once: the arrays of a figure stay in the second-level cache

Array = np.ndarray


class Motion(NamedTuple):
    """The parameters of one figure's programme. `speed` is the figure's mean speed (rms over figure and time)."""

    speed: float  # pixels per frame
    period: float  # frames
    radius: float  # pixels, of the figure
    direction: float
    sign: float
    phase: float


class Pose(NamedTuple):
    """Displacement, rotation and log scale at each time [T]; a plain 0.0 where a programme leaves one alone."""

    dx: Array | float = 0.0
    dy: Array | float = 0.0
    angle: Array | float = 0.0
    log_scale: Array | float = 0.0


def _swing(motion: Motion, time: Array, lever: float, limit: float) -> Array:
    """A sine whose rms rate times `lever` is the speed; beyond the amplitude `limit` the period shrinks instead."""
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


# The motion programmes: turn in place, swing to and fro along a line, grow and shrink, run round a circle without
# turning, rock in place, cross the frame. Periodic ones return to where they were, so their mean flow is zero.
MOTIONS: dict[str, Callable[[Motion, Array], Pose]] = {
    "rotate": _rotate,
    "shuttle": _shuttle,
    "pulse": _pulse,
    "orbit": _orbit,
    "rock": _rock,
    "glide": _glide,
}

# A motion has its pace, as walking and running do: pixels a frame, rms; a source's is .8 to 1.25 times it, so that
# those of neighbours overlap.
PACE = {"rotate": 2.3, "shuttle": 1.5, "pulse": 1.0, "orbit": 1.9, "rock": 1.25, "glide": 2.8}


def _clouds(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Smooth noise of about one wavelength: plane waves of random direction, standard deviation 1."""
    waves = 10
    angle, length = rng.uniform(0, 2 * math.pi, waves), rng.uniform(0.7, 1.6, waves)
    phase = rng.uniform(0, 2 * math.pi, waves)
    total = np.zeros(np.broadcast_shapes(x.shape, y.shape))
    for a, scale, p in zip(angle, 2 * math.pi / length, phase, strict=True):
        total += np.sin(scale * (math.cos(a) * x + math.sin(a) * y) + p)
    return total * math.sqrt(2 / waves)


# Patterns over (x, y) in wavelengths, roughly in -1..1; and outlines, radius at an angle as a share of the figure's.
_PATTERNS: dict[str, Callable[[Array, Array, np.random.Generator], Array]] = {
    "stripes": lambda x, y, rng: np.sin(2 * math.pi * x),
    "checks": lambda x, y, rng: 1.5 * np.sin(4.4 * x) * np.sin(4.4 * y),
    "blobs": _clouds,
    "rings": lambda x, y, rng: np.sin(2 * math.pi * np.hypot(x, y)),
    "dots": lambda x, y, rng: np.cos(2 * math.pi * x) + np.cos(2 * math.pi * y) - 0.5,
    "zigzag": lambda x, y, rng: np.sin(2 * math.pi * (x + np.abs(y % 2 - 1))),
}
_OUTLINES: dict[str, Callable[[Array], Array]] = {
    "stripes": lambda a: np.full_like(a, 0.95),  # disc
    "checks": lambda a: 0.8 + 0.2 * np.cos(5 * a),  # star
    "blobs": lambda a: 0.9 / (np.cos(a) ** 4 + np.sin(a) ** 4) ** 0.25,  # rounded square
    "rings": lambda a: 0.8 + 0.2 * np.cos(3 * a),  # trefoil
    "dots": lambda a: np.minimum(1 / np.maximum(np.abs(np.cos(a)), 0.1), 0.6 / np.maximum(np.abs(np.sin(a)), 0.1)),
    "zigzag": lambda a: 0.55 / np.cos((a % (2 * math.pi / 3)) - math.pi / 3),  # triangle
}
SCENES = tuple(_PATTERNS)  # a scene kind is a pattern, on figures and background alike, and an outline of figures


# A kind of scene has its colours, as pools are blue and pitches green: the mean hue (in turns) of its ground and of the
# figures on it, from which a source strays by HUE_SPREAD (standard deviation), and the relative size of its pattern.
_GROUND_HUE = {"stripes": 0.08, "checks": 0.33, "blobs": 0.58, "rings": 0.83, "dots": 0.20, "zigzag": 0.45}
_FIGURE_HUE = {"stripes": 0.50, "checks": 0.00, "blobs": 0.13, "rings": 0.30, "dots": 0.70, "zigzag": 0.92}
_COARSENESS = {"stripes": 1.0, "checks": 1.25, "blobs": 1.4, "rings": 0.85, "dots": 0.75, "zigzag": 1.1}
HUE_SPREAD = 0.05


def _palette(hue: float, rng: np.random.Generator) -> Array:
    """A dark and a bright colour of hues about `hue`, in random order, [2, 3] in 0..255."""
    first, second = rng.normal(hue, HUE_SPREAD, 2) % 1
    dark = colorsys.hsv_to_rgb(first, rng.uniform(0.4, 0.8), rng.uniform(0.2, 0.45))
    bright = colorsys.hsv_to_rgb(second, rng.uniform(0.2, 0.6), rng.uniform(0.65, 1.0))
    return 255 * np.array([dark, bright] if rng.uniform() < 0.5 else [bright, dark])


def _texture(scene: str, hue: float, height: int, width: int, wavelength: float, rng: np.random.Generator) -> Array:
    """A piece of the scene's pattern at random place and angle, two colours about `hue`: [height, width, 3] 0..255."""
    wavelength *= _COARSENESS[scene]
    angle, (x0, y0) = rng.uniform(0, 2 * math.pi), rng.uniform(-3, 3, 2)
    across = (np.arange(width) - width / 2)[None, :] / wavelength
    down = (np.arange(height) - height / 2)[:, None] / wavelength
    x = math.cos(angle) * across - math.sin(angle) * down + x0
    y = math.sin(angle) * across + math.cos(angle) * down + y0
    value = np.tanh(1.6 * _PATTERNS[scene](x, y, rng)) + 0.35 * _clouds(x, y, rng)  # no instance repeats exactly
    share = np.clip(0.5 + 0.42 * value, 0, 1)[..., None]
    first, second = _palette(hue, rng)
    return (first * (1 - share) + second * share).astype(np.float32)


@dataclass(frozen=True)
class Figure:
    texture: Array  # float32 [S, S, 4]: colour times alpha in 0..255, and alpha in 0..1; its border is transparent
    reach: float  # pixels: how far from its centre the figure is drawn at its largest
    position: Callable[[Array], tuple[Array, Array]]  # time [T] -> centre x, y [T] in the scene, before the programme
    programme: Callable[[Array], Pose]


@dataclass(frozen=True)
class Wave:
    """A slow sum of two sines of the time, in -1..1: camera drift and lighting."""

    periods: tuple[float, float]  # frames
    phases: tuple[float, float]

    def __call__(self, time: Array) -> Array:
        return sum(0.5 * np.sin(2 * math.pi * time / p + q) for p, q in zip(self.periods, self.phases, strict=True))


@dataclass(frozen=True)
class Source:
    """One take: what its clips share."""

    height: int
    width: int
    background: Array  # float32 [H + 2 margin, W + 2 margin, 3]
    margin: int
    figures: tuple[Figure, ...]  # in drawing order: distractors behind
    drift: float  # pixels: amplitude of the camera's drift along x and y
    camera: tuple[Wave, Wave]
    light: Wave
    flicker: float  # share: amplitude of the lighting change
    shade: Array  # float32 [H, W, 1]: fixed fall-off of the light across the frame
    noise: float  # standard deviation of the sensor noise, in 0..255


def make_source(motion: str, scene: str, rng: np.random.Generator, *, height: int, width: int) -> Source:
    """Draws one source of the class (motion, scene). All of it comes from `rng`."""
    unit = min(height, width) / 120
    drift = unit * rng.uniform(1.5, 5)
    margin = math.ceil(drift) + 2
    wavelength = unit * rng.uniform(18, 28)
    background = _texture(scene, _GROUND_HUE[scene], height + 2 * margin, width + 2 * margin, wavelength, rng)
    distractors = [_distractor(rng, height, width) for _ in range(rng.integers(1, 3))]
    angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.2)
    x, y = np.linspace(-1, 1, width)[None, :], np.linspace(-1, 1, height)[:, None]
    shade = 1 + slope * (math.cos(angle) * x + math.sin(angle) * y)
    return Source(
        height=height,
        width=width,
        background=background,
        margin=margin,
        figures=(*distractors, *_performers(motion, scene, rng, height, width)),
        drift=drift,
        camera=(_wave(rng), _wave(rng)),
        light=_wave(rng),
        flicker=rng.uniform(0.02, 0.15),
        shade=shade.astype(np.float32)[..., None],
        noise=rng.uniform(1, 4),
    )


def _wave(rng: np.random.Generator) -> Wave:
    return Wave(tuple(rng.uniform(50, 150, 2)), tuple(rng.uniform(0, 2 * math.pi, 2)))


def _performers(motion: str, scene: str, rng: np.random.Generator, height: int, width: int) -> list[Figure]:
    """One to three figures, side by side, of one pace; each with its own texture, direction, sense and phase."""
    unit = min(height, width) / 120
    count = int(rng.integers(1, 4))
    speed, period = unit * PACE[motion] * rng.uniform(0.8, 1.25), rng.uniform(12, 24)
    places = (rng.permutation(count) + rng.uniform(0.35, 0.65, count)) / count * width
    figures = []
    for x in places:
        radius = unit * rng.uniform(*((26, 34), (20, 26), (16, 20))[count - 1])
        y = height * rng.uniform(0.35, 0.65)
        direction, phase = rng.uniform(0, 2 * math.pi, 2)
        parameters = Motion(speed, period, radius, direction, rng.choice((-1.0, 1.0)), phase)
        figures.append(
            Figure(
                texture=_figure_texture(scene, radius, unit * rng.uniform(8, 15), rng),
                reach=radius * (math.exp(0.5) if motion == "pulse" else 1),
                position=lambda time, x=x, y=y: (np.full(len(time), x), np.full(len(time), y)),
                programme=lambda time, parameters=parameters: MOTIONS[motion](parameters, time),
            )
        )
    return figures


def _distractor(rng: np.random.Generator, height: int, width: int) -> Figure:
    """A small figure of any scene kind that follows no programme: it drifts straight and turns back at the edges."""
    unit = min(height, width) / 120
    radius = unit * rng.uniform(8, 14)
    (dx, dy), (x0, y0) = unit * rng.uniform(-0.6, 0.6, 2), rng.uniform(0, 2, 2)

    def position(time: Array) -> tuple[Array, Array]:
        x, y = (x0 + dx * time / width) % 2, (y0 + dy * time / height) % 2
        return width * np.abs(x - 1), height * np.abs(y - 1)

    texture = _figure_texture(str(rng.choice(SCENES)), radius, unit * rng.uniform(8, 15), rng)
    return Figure(texture, radius, position, lambda time: Pose())


def _figure_texture(scene: str, radius: float, wavelength: float, rng: np.random.Generator) -> Array:
    """The scene's pattern cut to the scene's outline, float32 [S, S, 4]."""
    half = math.ceil(radius * 1.2) + 2
    x = np.arange(-half, half + 1.0)[None, :] / radius
    y = np.arange(-half, half + 1.0)[:, None] / (radius * rng.uniform(0.75, 1.0))
    distance = np.hypot(x, y)
    outline = np.minimum(_OUTLINES[scene](np.arctan2(y, x)), 1.1)
    alpha = np.clip(radius * (outline - distance) + 0.5, 0, 1)[..., None].astype(np.float32)
    colour = _texture(scene, _FIGURE_HUE[scene], 2 * half + 1, 2 * half + 1, wavelength, rng)
    return np.concatenate([colour * alpha, alpha], axis=2)


def render(source: Source, start: int, frames: int, rng: np.random.Generator) -> Array:
    """Frames `start` .. `start + frames - 1` of a take, uint8 RGB [T, H, W, 3]; `rng` draws the sensor noise."""
    height, width = source.height, source.width
    noise = source.noise * rng.standard_normal((height + 32, width + 32), dtype=np.float32)
    offsets = rng.integers(0, 33, (frames, 2))  # every frame sees another part of one noise plane
    out = np.empty((frames, height, width, 3), np.uint8)
    for first in range(0, frames, CHUNK):
        time = np.arange(start + first, start + min(first + CHUNK, frames), dtype=np.float64)
        canvas = np.empty((len(time), height, width, 3), np.float32)
        camera_x, camera_y = (source.drift * wave(time) for wave in source.camera)
        for frame, x, y in zip(canvas, camera_x, camera_y, strict=True):
            _shifted(source.background, source.margin - x, source.margin - y, frame)
        for figure in source.figures:
            _draw(figure, time, camera_x, camera_y, canvas)
        gain = (1 + source.flicker * source.light(time)).astype(np.float32)
        for i in range(len(time)):
            y, x = offsets[first + i]
            lit = canvas[i]
            lit *= gain[i] * source.shade
            lit += noise[y : y + height, x : x + width, None]
            out[first + i] = np.clip(lit, 0, 255, out=lit)
    return out


def _shifted(plane: Array, x: float, y: float, out: Array) -> None:
    """`out` [H, W, 3] = the part of `plane` whose corner lies at (x, y) >= 0, bilinear."""
    height, width = out.shape[:2]
    column, row = int(x), int(y)
    fx, fy = np.float32(x - column), np.float32(y - row)
    rows = plane[row : row + height + 1, column : column + width + 1]
    blend = rows[:-1] * (1 - fy) + rows[1:] * fy
    np.multiply(blend[:, :-1], 1 - fx, out=out)
    out += blend[:, 1:] * fx


def _draw(figure: Figure, time: Array, camera_x: Array, camera_y: Array, canvas: Array) -> None:
    """Draws a figure at every time into canvas [T, H, W, 3]; one that leaves on one side comes back on the other."""
    pose = figure.programme(time)
    x, y = figure.position(time)
    reach = math.ceil(1.15 * figure.reach) + 1
    height, width = canvas.shape[1:3]
    x = (x + pose.dx + camera_x + reach) % (width + 2 * reach) - reach
    y = (y + pose.dy + camera_y + reach) % (height + 2 * reach) - reach
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    grid = np.arange(-reach, reach + 2)
    dx = (grid[None, :] - (x - column)[:, None]).astype(np.float32)  # [T, n]
    dy = (grid[None, :] - (y - row)[:, None]).astype(np.float32)
    shrink = np.exp(-pose.log_scale) * np.ones(len(time))
    cos, sin = ((f(pose.angle) * shrink).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    centre = np.float32(figure.texture.shape[0] // 2)
    u = cos * dx[:, None, :] + sin * dy[:, :, None] + centre  # [T, n, n]
    v = cos * dy[:, :, None] - sin * dx[:, None, :] + centre
    patch = _sampled(figure.texture, u, v)  # [T, n, n, 4]
    patch, cover = patch[..., :3], 1 - patch[..., 3:]
    for i, (top, left) in enumerate(zip(row - reach, column - reach, strict=True)):
        rows = slice(max(-top, 0), max(height - top, 0))  # the part of the patch inside the frame
        columns = slice(max(-left, 0), max(width - left, 0))
        region = canvas[i, max(top, 0) : max(top + len(grid), 0), max(left, 0) : max(left + len(grid), 0)]
        region *= cover[i, rows, columns]
        region += patch[i, rows, columns]


def _sampled(texture: Array, u: Array, v: Array) -> Array:
    """Bilinear samples of texture [S, S, 4] at columns u and rows v [...]; outside it is transparent: [..., 4]."""
    side = texture.shape[0]
    u, v = np.clip(u, 0, side - 1.001), np.clip(v, 0, side - 1.001)
    column, row = u.astype(np.int32), v.astype(np.int32)
    fu, fv = (u - column)[..., None], (v - row)[..., None]
    flat, index = texture.reshape(-1, 4), row * side + column
    upper = flat.take(index, axis=0)
    upper += fu * (flat.take(index + 1, axis=0) - upper)
    lower = flat.take(index + side, axis=0)
    lower += fu * (flat.take(index + side + 1, axis=0) - lower)
    upper += fv * (lower - upper)
    return upper
