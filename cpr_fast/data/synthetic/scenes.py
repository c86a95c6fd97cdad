"""The kinds of scene of synthetic actions: patterns, outlines of figures, and colours.

A kind of scene is the pattern on the figures and on the background, the outline of the figures, and their colours.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable

import numpy as np

from cpr_fast.data.synthetic.motions import Array
from cpr_fast.data.synthetic.versions import Version


def _clouds(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Returns smooth noise of about one wavelength and standard deviation 1: a sum of random plane waves."""
    waves = 10
    angle, length = rng.uniform(0, 2 * math.pi, waves), rng.uniform(0.7, 1.6, waves)
    phase = rng.uniform(0, 2 * math.pi, waves)
    total = np.zeros(np.broadcast_shapes(x.shape, y.shape))
    for a, scale, p in zip(angle, 2 * math.pi / length, phase, strict=True):
        total += np.sin(scale * (math.cos(a) * x + math.sin(a) * y) + p)
    return total * math.sqrt(2 / waves)


# Patterns at (x, y) in wavelengths, with values roughly in -1..1; and outlines: the radius at an angle, as a share of
# the radius of the figure.
_PATTERNS: dict[str, Callable[[Array, Array, np.random.Generator], Array]] = {
    "stripes": lambda x, y, rng: np.sin(2 * math.pi * x),
    "checks": lambda x, y, rng: 1.5 * np.sin(4.4 * x) * np.sin(4.4 * y),
    "blobs": _clouds,
    "rings": lambda x, y, rng: np.sin(2 * math.pi * np.hypot(x, y)),
    "dots": lambda x, y, rng: np.cos(2 * math.pi * x) + np.cos(2 * math.pi * y) - 0.5,
    "zigzag": lambda x, y, rng: np.sin(2 * math.pi * (x + np.abs(y % 2 - 1))),
}
OUTLINES: dict[str, Callable[[Array], Array]] = {
    "stripes": lambda a: np.full_like(a, 0.95),  # disc
    "checks": lambda a: 0.8 + 0.2 * np.cos(5 * a),  # star
    "blobs": lambda a: 0.9 / (np.cos(a) ** 4 + np.sin(a) ** 4) ** 0.25,  # rounded square
    "rings": lambda a: 0.8 + 0.2 * np.cos(3 * a),  # trefoil
    "dots": lambda a: np.minimum(1 / np.maximum(np.abs(np.cos(a)), 0.1), 0.6 / np.maximum(np.abs(np.sin(a)), 0.1)),
    "zigzag": lambda a: 0.55 / np.cos((a % (2 * math.pi / 3)) - math.pi / 3),  # triangle
}
SCENES = tuple(_PATTERNS)  # the names of the kinds of scene

# A kind of scene has typical colours, just as pools are blue and pitches are green. These are the mean hue (0..1 is a
# full turn) of the background and of the figures. The hues of a source are drawn around these with standard deviation
# `Version.hue_spread`. COARSENESS is the relative size of the pattern.
GROUND_HUE = {"stripes": 0.08, "checks": 0.33, "blobs": 0.58, "rings": 0.83, "dots": 0.20, "zigzag": 0.45}
FIGURE_HUE = {"stripes": 0.50, "checks": 0.00, "blobs": 0.13, "rings": 0.30, "dots": 0.70, "zigzag": 0.92}
COARSENESS = {"stripes": 1.0, "checks": 1.25, "blobs": 1.4, "rings": 0.85, "dots": 0.75, "zigzag": 1.1}


def _palette(hue: float, rng: np.random.Generator, version: Version) -> Array:
    """Returns a dark and a bright colour of hues around `hue`, in random order if the version is `reversible`, [2, 3]
    in 0..255."""
    first, second = rng.normal(hue, version.hue_spread, 2) % 1
    dark = colorsys.hsv_to_rgb(first, *(rng.uniform(*between) for between in version.dark))
    bright = colorsys.hsv_to_rgb(second, *(rng.uniform(*between) for between in version.bright))
    exchanged = version.reversible and rng.uniform() >= 0.5
    return 255 * np.array([bright, dark] if exchanged else [dark, bright])


def scene_texture(
    scene: str, hue: float, height: int, width: int, wavelength: float, rng: np.random.Generator, version: Version
) -> Array:
    """Returns a piece of the scene's pattern at a random place and angle in two colours around `hue`, float32
    [height, width, 3] in 0..255."""
    wavelength *= COARSENESS[scene]
    angle = rng.uniform(0, 2 * math.pi) if version.tilt is None else rng.uniform(-version.tilt, version.tilt)
    x0, y0 = rng.uniform(-3, 3, 2)
    across = (np.arange(width) - width / 2)[None, :] / wavelength
    down = (np.arange(height) - height / 2)[:, None] / wavelength
    x = math.cos(angle) * across - math.sin(angle) * down + x0
    y = math.sin(angle) * across + math.cos(angle) * down + y0
    value = np.tanh(1.6 * _PATTERNS[scene](x, y, rng)) + 0.35 * _clouds(x, y, rng)  # so no two pieces are exactly alike
    share = np.clip(0.5 + 0.42 * value, 0, 1)[..., None]
    first, second = _palette(hue, rng, version)
    return (first * (1 - share) + second * share).astype(np.float32)
