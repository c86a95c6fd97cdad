"""Optical flow by OpenCV, and synthetic frames whose flow is known."""

import numpy as np
import pytest
import torch

DEFAULTS = {
    "tau": 0.25,
    "lambda_": 0.15,
    "theta": 0.3,
    "scales": 5,
    "scale_step": 0.8,
    "warps": 5,
    "epsilon": 0.01,
    "inner_iterations": 30,
    "outer_iterations": 10,
    "median": 5,
}

cv2 = pytest.importorskip("cv2")


SHORT = {"scales": 1, "warps": 1, "outer_iterations": 1, "inner_iterations": 8, "epsilon": 0.0}


def moving_texture(frames: int, height: int, width: int, seed: int, velocity=(1.5, -0.7)) -> torch.Tensor:
    """Draws a textured disc that moves by `velocity` pixels per frame over another texture at rest: [T, H, W] uint8."""
    generator = np.random.default_rng(seed)
    noise = generator.random((2, height + 64, width + 64)).astype(np.float32)
    ground, figure = (cv2.normalize(cv2.GaussianBlur(n, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX) for n in noise)
    y, x = np.mgrid[:height, :width]
    clip = []
    for t in range(frames):
        dx, dy = velocity[0] * t, velocity[1] * t
        inside = np.hypot(x - width / 2 - dx, y - height / 2 - dy) < min(height, width) / 3
        moved = cv2.warpAffine(
            figure, np.float32([[1, 0, dx - 32], [0, 1, dy - 32]]), (width, height), flags=cv2.INTER_CUBIC
        )
        clip.append(np.where(inside, moved, ground[:height, :width]).clip(0, 255).round().astype(np.uint8))
    return torch.from_numpy(np.stack(clip))


def opencv_flow(frames: torch.Tensor, **settings) -> torch.Tensor:
    """Computes the flow with OpenCV: frames [T, H, W] to [T-1, 2, H, W]."""
    flows = []
    for first, second in zip(frames.numpy()[:-1], frames.numpy()[1:], strict=True):
        solver = (
            cv2.optflow.createOptFlow_DualTVL1()
        )  # a new solver each time, because it remembers a shortened pyramid
        for name, value in settings.items():
            setter = {"scales": "ScalesNumber", "warps": "WarpingsNumber", "median": "MedianFiltering"}.get(name)
            getattr(solver, "set" + (setter or name.title().replace("_", "")))(value)
        flows.append(solver.calc(first, second, None).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(flows))


def assert_close_to_opencv(flow: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts a mean endpoint error <= .05 px and 99th percentile <= .5 px, over static and over moving pixels."""
    error, moving = (flow - expected).norm(dim=-3), expected.norm(dim=-3) > 0.5
    for name, selected in (("static", ~moving), ("moving", moving)):
        assert selected.any(), f"no {name} pixels: the comparison says nothing"
        assert error[selected].mean() <= 0.05, name
        assert np.quantile(error[selected].numpy(), 0.99) <= 0.5, name
