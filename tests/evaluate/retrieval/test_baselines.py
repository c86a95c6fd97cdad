"""Compares the label-free baselines with NumPy on frames of known content."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpr_fast.evaluate.retrieval.baselines import (
    BASELINES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    mean_colour,
    mean_flow,
    single_frame,
)


def normalise(pixels: np.ndarray) -> torch.Tensor:
    """Converts uint8 [N, 3, T, H, W] to the normalised clips that the pipeline returns."""
    shape = (1, 3, 1, 1, 1)
    mean, std = np.reshape(IMAGENET_MEAN, shape), np.reshape(IMAGENET_STD, shape)
    return torch.from_numpy(((pixels / 255 - mean) / std).astype(np.float32))


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 3, 5, 48, 64), dtype=np.uint8)


def test_mean_colour_is_the_mean_of_the_pixels(pixels):
    assert mean_colour(normalise(pixels)).numpy() == pytest.approx(pixels.mean((2, 3, 4)) / 255, abs=1e-5)


def test_mean_flow_separates_signed_from_absolute_motion():
    # u alternates by +-51 levels, v is constant at 25.5: the mean of u is zero, its mean absolute value is not.
    flow = np.full((1, 3, 4, 8, 8), 128.0)
    flow[:, 2, ::2] += 51
    flow[:, 2, 1::2] -= 51
    flow[:, 1] += 25.5
    expected = [[0.1, 0, 0.1, 0.2]]
    assert mean_flow(normalise(flow)).numpy() == pytest.approx(np.array(expected), abs=1e-5)


def test_single_frame_is_the_middle_frame_as_a_centred_thumbnail(pixels):
    middle = pixels[:, :, 2].astype(np.float64) / 255
    thumbnail = middle.reshape(3, 3, 16, 3, 16, 4).mean((3, 5))
    thumbnail -= thumbnail.mean((2, 3), keepdims=True)
    assert single_frame(normalise(pixels)).numpy() == pytest.approx(thumbnail.reshape(3, -1), abs=1e-5)


def test_single_frame_ignores_brightness(pixels):
    darker = (pixels // 2).astype(np.uint8)
    brighter = darker + 90
    a, b = single_frame(normalise(darker)), single_frame(normalise(brighter))
    assert torch.nn.functional.cosine_similarity(a, b).numpy() == pytest.approx(np.ones(3), abs=1e-5)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_take_clips_smaller_than_the_thumbnail(name):
    assert BASELINES[name].function(torch.zeros(2, 3, 1, 7, 5)).isfinite().all()
