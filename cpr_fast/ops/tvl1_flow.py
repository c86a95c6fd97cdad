"""TV-L1 optical flow [Zach, Pock, Bischof 2007], as OpenCV's DualTVL1OpticalFlow computes it.

Letters in shapes: P frame pairs, T frames, H x W pixels. Components and directions are ordered (x, y).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .binding import checks, library

_MIN_SIDE = 16  # pixels; the shortest side that a level of the pyramid may have
_MOST_LEVELS = 1000  # limit of the levels of the pyramid, all of which are stored
_ROUNDING = 1e-4  # tolerance of the range 0..1 of float frames: rounding can raise a weighted mean of channels above 1


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
    """Returns the TV-L1 optical flow from each frame of a grey video to the next, as OpenCV computes it.

    Minimises the total variation of the flow plus `lambda_` times the absolute difference in brightness, from coarse to
    fine. The flow of a pair does not depend on the other pairs or on the number of threads. It equals OpenCV's up to
    rounding errors, which the stopping test and the median filter amplify at a few pixels. On CUDA all pairs run in one
    launch and the host does not wait. Operations are rounded as on the CPU, so results can differ only where a value is
    within rounding of the threshold of the stopping test.

    Args:
        frames: [..., T, H, W] grey, T >= 2, uint8 in 0..255 or float32 in 0..1, any strides. Colour frames are refused:
            average the channels first. Because [T, 3, H, W] is how colour videos are stored, a batch of clips of three
            frames is refused as well: pass each as [3, H, W], or its pairs, `frames.unfold(-3, 2, 1).movedim(-1, -3)`.
        tau: step of the dual variables.
        theta: coupling between the data term and the total variation term, which are minimised alternately.
        scales: maximum number of pyramid levels. Each is `scale_step` (in 0..1) times the size of the previous one, and
            no side is shorter than 16 pixels.
        warps: number of warpings at each level.
        epsilon: the inner iterations stop when one changes the flow by less than this (root mean square, in pixels).
        inner_iterations, outer_iterations: maximum numbers of iterations.
        median: side of the median filter that is applied before every outer iteration, in pixels: 3 or 5; 0 or 1 for
            no filter.

    Returns:
        [..., T-1, 2, H, W] float32: (u, v) in pixels, u to the right and v down. It carries no gradient.

    Raises:
        TypeError, ValueError: the message names the argument. Float frames outside 0..1, or with NaN, raise ValueError
        on the CPU. On CUDA and in compiled programs, where their values are not read, the flow of such a pair is NaN.
        NotImplementedError: no kernel for the device. MemoryError: no memory for the results, or for dense copies of
        the arguments.

    Example:
        >>> video = torch.randint(0, 256, (16, 112, 112), dtype=torch.uint8)
        >>> tvl1_flow(video).shape
        torch.Size([15, 2, 112, 112])
    """
    settings = (tau, lambda_, theta, scales, scale_step, warps, epsilon, inner_iterations, outer_iterations, median)
    settings = _check(frames, *settings)
    *leading, T, H, W = frames.shape
    frames = _in_range(frames.detach()).reshape(math.prod(leading), T, H, W)
    try:
        flow, _ = ops.tvl1_flow(frames, *settings)
    except Exception as error:
        checks.raise_if_out_of_memory("tvl1_flow", error, frames=frames)
        raise
    return flow.reshape(*leading, T - 1, 2, H, W)


def stop_tvl1_flow(stop: bool) -> None:
    """Ends the calls of `tvl1_flow` that other threads compute on the CPU: they raise RuntimeError, and so do later
    ones until this is called with False. Otherwise a call takes minutes for a batch of large frames."""
    library.call("cpr_tvl1_flow_stop", int(stop))


def _in_range(frames: Tensor) -> Tensor:
    """Returns `frames`. Raises for float values outside 0..1, or replaces them by NaN where they cannot be read."""
    if frames.dtype == torch.uint8 or frames.numel() == 0:
        return frames
    if not checks.readable(frames):
        valid = (frames >= -_ROUNDING) & (frames <= 1 + _ROUNDING)
        return torch.where(valid, frames, math.nan)
    low, high = (value.item() for value in torch.aminmax(frames))
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        advice = "; divide frames in 0..255 by 255, or pass uint8" if 1 < high <= 255 and low >= 0 else ""
        raise ValueError(f"frames: expected float values in 0..1, got values from {low:g} to {high:g}{advice}")
    return frames


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
    """Computes `tvl1_flow` in plain PyTorch, on any device, all pairs at once; much slower.

    Arguments and result as for `tvl1_flow`; they are not checked.
    """
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
    """Alternates thresholding and dual steps for one linearisation; pairs that have converged are not changed."""
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
    """Resizes [..., h, w] to `size`, bilinear; `scale` is source pixels per target pixel, pixel centres aligned."""
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
    """Returns forward differences, [P, 2, h, w] -> [P, component, direction, h, w]; 0 at the last row and column."""
    return torch.stack([F.pad(u.diff(dim=-1), (0, 1)), F.pad(u.diff(dim=-2), (0, 0, 0, 1))], 2)


def _divergence(dual: Tensor) -> Tensor:
    """Returns the divergence [P, 2, h, w] of [P, component, direction, h, w]: minus the adjoint of
    `_forward_gradient`."""
    return F.pad(dual[:, :, 0], (1, 0)).diff(dim=-1) + F.pad(dual[:, :, 1], (0, 0, 1, 0)).diff(dim=-2)


def _median_filter(u: Tensor, size: int) -> Tensor:
    radius = size // 2
    windows = F.pad(u, (radius,) * 4, mode="replicate").unfold(2, size, 1).unfold(3, size, 1)
    return windows.flatten(-2).median(-1).values


@torch.library.register_fake(add_op_namespace_prefix("tvl1_flow"))
def _fake(frames, *settings):
    N, T, H, W = frames.shape
    flow = frames.new_empty((N, T - 1, 2, H, W), dtype=torch.float32)
    return flow, frames.new_empty((N, T - 1), dtype=torch.int64)


def _map(info, in_dims, frames, *settings):
    """Implements torch.vmap: a single call for the clips of all slices."""
    outputs = ops.tvl1_flow(library.fold(frames, in_dims[0], info.batch_size, 0), *settings)
    return tuple(output.unflatten(0, (info.batch_size, -1)) for output in outputs), (0, 0)


library.register_vmap("tvl1_flow", _map)


def _check(
    frames, tau, lambda_, theta, scales, scale_step, warps, epsilon, inner_iterations, outer_iterations, median
) -> tuple:
    """Returns the settings as plain numbers. Raises an error for the first invalid argument; does not read pixels."""
    _check_frames(frames)
    reals = {"tau": tau, "lambda_": lambda_, "theta": theta, "scale_step": scale_step, "epsilon": epsilon}
    nonzero = ("tau", "lambda_", "theta")
    reals = {n: (checks.positive if n in nonzero else checks.number)(n, value) for n, value in reals.items()}
    if not 0 < reals["scale_step"] < 1:
        raise ValueError(f"scale_step: expected a number between 0 and 1, got {reals['scale_step']}")
    if not 0 <= reals["epsilon"] < math.inf:
        raise ValueError(f"epsilon: expected a number >= 0, got {reals['epsilon']}")
    counts = {
        "scales": scales,
        "warps": warps,
        "inner_iterations": inner_iterations,
        "outer_iterations": outer_iterations,
    }
    counts = {name: checks.count(name, value) for name, value in counts.items()}
    if (levels := _levels(frames.shape[-2:], counts["scales"], reals["scale_step"])) > _MOST_LEVELS:
        raise ValueError(
            f"scale_step: expected a step with which {list(frames.shape[-2:])} pixels have at most {_MOST_LEVELS} "
            f"levels (or smaller scales), got {reals['scale_step']}, which makes {levels}"
        )
    median = checks.integer("median", median)
    if median not in (0, 1, 3, 5):
        raise ValueError(f"median: expected 0 or 1 (none), 3 or 5, got {median}")
    tau, lambda_, theta, scale_step, epsilon = reals.values()
    scales, warps, inner_iterations, outer_iterations = counts.values()
    return tau, lambda_, theta, scales, scale_step, warps, epsilon, inner_iterations, outer_iterations, median


def _levels(size, scales: int, step: float) -> int:
    """Returns about how many levels the pyramid of frames of this size has; `scales` if that is not many."""
    if scales <= _MOST_LEVELS or min(size) <= _MIN_SIDE:
        return min(scales, _MOST_LEVELS)
    return min(scales, int(math.log(_MIN_SIDE / min(size)) / math.log(step)))


def _check_frames(frames) -> None:
    if not isinstance(frames, Tensor):
        hint = " (torch.from_numpy converts an array)" if type(frames).__module__ == "numpy" else ""
        raise TypeError(f"frames: expected a torch.Tensor [..., T, H, W], got {checks.describe(frames)}{hint}")
    checks.check_dense("frames", frames)
    if frames.dtype not in (torch.uint8, torch.float32):
        raise TypeError(f"frames: expected uint8 or float32, got {frames.dtype}")
    shape = list(frames.shape)
    if len(shape) >= 4 and (shape[-1] in (1, 3, 4) or shape[-3] in (1, 3)):
        channels_last = shape[-1] in (1, 3, 4)
        raise ValueError(
            f"frames: expected grey frames [..., T, H, W], got shape {shape}, whose "
            f"{'last dimension' if channels_last else 'third dimension from the end'} looks like channels; "
            f"average colour channels, and remove a single one by squeeze({-1 if channels_last else -3})"
        )
    if len(shape) == 3 and shape[-1] in (3, 4) and min(shape[:2]) >= _MIN_SIDE:
        raise ValueError(
            f"frames: expected grey frames [T, H, W], got shape {shape}, whose last dimension looks like channels "
            "of one colour picture; average them, and stack the frames of a video"
        )
    if len(shape) < 3 or shape[-3] < 2 or 0 in shape[-2:]:
        raise ValueError(f"frames: expected shape [..., T, H, W] with T >= 2, H, W >= 1, got {shape}")
    if frames.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"frames: tvl1_flow runs on the CPU and on CUDA, got a tensor on {frames.device}")
    checks.check_device("frames", frames, "tvl1_flow")
    if frames.requires_grad and torch.is_grad_enabled():
        raise ValueError("frames: tvl1_flow has no gradient, got a tensor that requires one; pass frames.detach()")
