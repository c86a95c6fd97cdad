"""Renders the frames of a synthetic source between two times.

Letters: T frames, H x W pixels.
"""

from __future__ import annotations

import math

import numpy as np

from cpr_fast.data.synthetic.motions import Array
from cpr_fast.data.synthetic.sources import Figure, Source

CHUNK = 8  # frames drawn at once, few enough for the arrays of a figure to stay in the second-level cache


def render(source: Source, start: int, frames: int, rng: np.random.Generator) -> Array:
    """Returns frames `start` to `start + frames - 1` of a source, uint8 RGB [T, H, W, 3]; `rng` draws the noise."""
    height, width = source.height, source.width
    noise = source.noise * rng.standard_normal((height + 32, width + 32), dtype=np.float32)
    offsets = rng.integers(0, 33, (frames, 2))  # every frame uses a different part of one plane of noise
    out = np.empty((frames, height, width, 3), np.uint8)
    for first in range(0, frames, CHUNK):
        time = source.step * np.arange(start + first, start + min(first + CHUNK, frames), dtype=np.float64)
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
    """Writes the part of `plane` whose top left corner is (x, y) >= 0 to `out` [H, W, 3], by bilinear interpolation."""
    height, width = out.shape[:2]
    column, row = int(x), int(y)
    fx, fy = np.float32(x - column), np.float32(y - row)
    rows = plane[row : row + height + 1, column : column + width + 1]
    blend = rows[:-1] * (1 - fy) + rows[1:] * fy
    np.multiply(blend[:, :-1], 1 - fx, out=out)
    out += blend[:, 1:] * fx


def _draw(figure: Figure, time: Array, camera_x: Array, camera_y: Array, canvas: Array) -> None:
    """Draws a figure at every time into canvas [T, H, W, 3]. A figure that leaves the frame on one side enters it on
    the other side.
    """
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
    """Returns bilinear samples [..., 4] of a texture [S, S, 4] at columns u and rows v [...]. Outside of the texture
    they are transparent, because its border is.
    """
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
