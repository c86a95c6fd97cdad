"""TV-L1 optical flow [Zach, Pock, Bischof 2007], as OpenCV's DualTVL1OpticalFlow computes it.

Letters: P frame pairs, T frames, H x W pixels. Components and directions are ordered (x, y).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cpr_fast.ops import _library  # noqa: F401 - registers torch.ops.cpr_fast

_MIN_SIDE = 16  # pixels; the pyramid has no coarser level with a shorter side


def tvl1_flow(
    frames: Tensor,  # [..., T, H, W]
    *,
    tau: float = 0.25,
    lambda_: float = 0.15,
    theta: float = 0.3,
    scales: int = 5,
    scale_step: float = 0.8,
    warps: int = 5,
    epsilon: float = 0.01,
    inner_iterations: int = 30,
    outer_iterations: int = 10,
    median: int = 5,
) -> Tensor:
    """Optical flow from each frame to the next: [..., T-1, 2, H, W] float32, (u, v) in pixels.

    Minimises the total variation of the flow plus `lambda_` times the absolute brightness difference, coarse to fine.
    The defaults are OpenCV's, and so is the answer, within what rounding makes of it: the stop test amplifies the last
    bit, in OpenCV against itself too. A pair's flow does not depend on the other pairs or on the number of threads; on
    CUDA every operation is rounded as on the CPU, and only a stop test within rounding of its threshold can differ. All
    pairs of a call run at once there, in one launch, without waiting for the host. Not differentiable.

    frames: gray, uint8 in 0..255 or float32 in 0..1, T >= 2, any strides, on the CPU or a CUDA device. The flow between
        two frames is NaN everywhere if either holds a NaN or infinite pixel.
    tau: step of the dual variables.  theta: coupling of the two halves of the splitting.
    scales: most pyramid levels, each `scale_step` (in 0..1) the size of the last, none shorter than 16 pixels.
    warps: warpings per level.  epsilon: stop once an inner iteration moves pixels by less (root mean square, pixels).
    inner_iterations, outer_iterations: most of them; a median filter over `median` x `median` pixels (3 or 5; 0 or 1
    for none) precedes every outer iteration.

    Raises ValueError or TypeError naming the bad argument, NotImplementedError on other devices.
    """
    settings = (tau, lambda_, theta, scales, scale_step, warps, epsilon, inner_iterations, outer_iterations, median)
    _check(frames, *settings)
    *leading, T, H, W = frames.shape
    flow, _ = torch.ops.cpr_fast.tvl1_flow(frames.detach().reshape(math.prod(leading), T, H, W), *settings)
    return flow.reshape(*leading, T - 1, 2, H, W)


def tvl1_flow_ref(
    frames: Tensor,  # [..., T, H, W]
    *,
    tau: float = 0.25,
    lambda_: float = 0.15,
    theta: float = 0.3,
    scales: int = 5,
    scale_step: float = 0.8,
    warps: int = 5,
    epsilon: float = 0.01,
    inner_iterations: int = 30,
    outer_iterations: int = 10,
    median: int = 5,
) -> Tensor:
    """`tvl1_flow` in plain torch, on any device, all pairs at once."""
    *leading, T, H, W = frames.shape
    levels = [frames.reshape(-1, T, H, W).float() * (1 if frames.dtype == torch.uint8 else 255)]
    while len(levels) < scales:
        size = [round(side * scale_step) for side in levels[-1].shape[-2:]]
        if min(size) < _MIN_SIDE:
            break
        levels.append(_resize(levels[-1], size, (1 / scale_step, 1 / scale_step)))
    flow = None
    for level in reversed(levels):
        first, second = level[:, :-1].flatten(0, 1), level[:, 1:].flatten(0, 1)  # [P, h, w]
        h, w = first.shape[-2:]
        if flow is None:
            flow = first.new_zeros(len(first), 2, h, w)
        else:
            flow = _resize(flow, (h, w), (flow.shape[-2] / h, flow.shape[-1] / w)) / scale_step
        dual = flow.new_zeros(len(first), 2, 2, h, w)  # [P, component, direction, h, w]
        for _ in range(warps):
            warped = _warp(torch.stack([second, *_central_gradient(second)], 1), flow)
            residual = warped[:, :1] - (warped[:, 1:] * flow).sum(1, keepdim=True) - first[:, None]
            flow, dual = _minimise(
                flow, dual, warped[:, 1:], residual, tau, lambda_, theta, epsilon, inner_iterations, outer_iterations,
                median,
            )  # fmt: skip
    return flow.reshape(*leading, T - 1, 2, H, W)


def _minimise(
    u, dual, gradient, residual, tau, lambda_, theta, epsilon, inner_iterations, outer_iterations, median
) -> tuple[Tensor, Tensor]:
    """Alternates thresholding and dual steps around one linearisation; a pair that has converged stands still."""
    squared_norm = gradient.square().sum(1, keepdim=True)  # [P, 1, h, w]
    bound = lambda_ * theta * squared_norm
    running = torch.ones(len(u), dtype=torch.bool, device=u.device)
    for _ in range(outer_iterations):
        if median > 1:
            u = torch.where(running[:, None, None, None], _median_filter(u, median), u)
        for _ in range(inner_iterations):
            rho = residual + (gradient * u).sum(1, keepdim=True)
            inside = torch.where(squared_norm > 0, -rho / squared_norm, 0)
            step = torch.where(rho.abs() > bound, -lambda_ * theta * rho.sign(), inside)
            new = u + step * gradient + theta * _divergence(dual)
            slope = _forward_gradient(new)
            new_dual = (dual + tau / theta * slope) / (1 + tau / theta * slope.norm(dim=2, keepdim=True))
            squared_change = (new - u).square().sum((1, 2, 3))
            u = torch.where(running[:, None, None, None], new, u)
            dual = torch.where(running[:, None, None, None, None], new_dual, dual)
            running = running & (squared_change > epsilon**2 * u[0, 0].numel())
            if not running.any():
                return u, dual
    return u, dual


def _resize(x: Tensor, size: tuple[int, int], scale: tuple[float, float]) -> Tensor:
    """Bilinear resize of [..., h, w] to `size`; `scale` is source pixels per target pixel, pixel centres aligned."""
    for axis, target, pixels in ((-2, size[0], scale[0]), (-1, size[1], scale[1])):
        source = x.shape[axis]
        position = ((torch.arange(target) + 0.5) * pixels - 0.5).clamp(0, source - 1)
        hat = (1 - (position[:, None] - torch.arange(source)).abs()).clamp(min=0).to(x)  # [target, source]
        x = hat @ x if axis == -2 else x @ hat.T
    return x


def _warp(images: Tensor, u: Tensor) -> Tensor:
    """Samples [P, C, h, w] at (x + u, y + v), bicubic, 0 outside."""
    h, w = u.shape[-2:]
    x = torch.arange(w).to(u) + u[:, 0]
    y = torch.arange(h).to(u)[:, None] + u[:, 1]
    grid = torch.stack([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1], -1)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="zeros", align_corners=False)


def _central_gradient(image: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    return (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2, (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2


def _forward_gradient(u: Tensor) -> Tensor:
    """[P, 2, h, w] to [P, component, direction, h, w]; 0 across the last row and column."""
    return torch.stack([F.pad(u.diff(dim=-1), (0, 1)), F.pad(u.diff(dim=-2), (0, 0, 0, 1))], 2)


def _divergence(dual: Tensor) -> Tensor:
    """Minus the adjoint of `_forward_gradient`."""
    return F.pad(dual[:, :, 0], (1, 0)).diff(dim=-1) + F.pad(dual[:, :, 1], (0, 0, 1, 0)).diff(dim=-2)


def _median_filter(u: Tensor, size: int) -> Tensor:
    radius = size // 2
    windows = F.pad(u, (radius,) * 4, mode="replicate").unfold(2, size, 1).unfold(3, size, 1)
    return windows.flatten(-2).median(-1).values


@torch.library.register_fake("cpr_fast::tvl1_flow")
def _fake(frames, *settings):
    N, T, H, W = frames.shape
    flow = frames.new_empty((N, T - 1, 2, H, W), dtype=torch.float32)
    return flow, frames.new_empty((N, T - 1), dtype=torch.int64)


def _check(
    frames, tau, lambda_, theta, scales, scale_step, warps, epsilon, inner_iterations, outer_iterations, median
) -> None:
    if frames.dtype not in (torch.uint8, torch.float32):
        raise TypeError(f"frames: expected uint8 or float32, got {frames.dtype}")
    if frames.dim() < 3 or frames.shape[-3] < 2 or 0 in frames.shape[-2:]:
        raise ValueError(f"frames: expected shape [..., T, H, W] with T >= 2, H, W >= 1, got {list(frames.shape)}")
    if frames.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"frames: tvl1_flow runs on the CPU and on CUDA, got a tensor on {frames.device}")
    for name, value in (("tau", tau), ("lambda_", lambda_), ("theta", theta)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    if not 0 < scale_step < 1:
        raise ValueError(f"scale_step: expected a number between 0 and 1, got {scale_step}")
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon: expected a number >= 0, got {epsilon}")
    counts = (
        ("scales", scales),
        ("warps", warps),
        ("inner_iterations", inner_iterations),
        ("outer_iterations", outer_iterations),
    )
    for name, value in counts:
        if not isinstance(value, int) or not 1 <= value < 2**31:
            raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
    if median not in (0, 1, 3, 5):
        raise ValueError(f"median: expected 0 or 1 (none), 3 or 5, got {median!r}")
