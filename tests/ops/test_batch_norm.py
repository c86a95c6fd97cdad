"""BatchNorm of channels-last memory on the CPU: as near to float64 as torch's BatchNorm of contiguous memory, with the
running statistics, errors and derivatives of torch.nn.BatchNorm3d."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpr_fast import _host
from cpr_fast.ops import BatchNorm1d, BatchNorm3d, batch_norm
from cpr_fast.ops.binding import library

LAST = torch.channels_last_3d
# Clips, channels, frames, height, width: single channels and values, odd sizes, blocks that are not full, many parts.
SHAPES = [
    (2, 3, 1, 1, 1),
    (7, 1, 3, 5, 9),
    (3, 17, 3, 5, 7),
    (1, 64, 1, 9, 11),
    (2, 1030, 1, 3, 5),
    (8, 8, 8, 32, 32),
    (4, 24, 5, 41, 37),
]


def draw(shape: tuple[int, ...], mean: float = 0.3) -> dict[str, Tensor]:
    """Returns inputs in float64 whose values are floats."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    C = shape[1]
    values = {
        "x": torch.randn(shape, generator=generator) + mean,
        "grad": torch.randn(shape, generator=generator) + 0.2,
        "weight": torch.rand(C, generator=generator) + 0.5,
        "bias": torch.randn(C, generator=generator),
        "running_mean": torch.randn(C, generator=generator),
        "running_var": torch.rand(C, generator=generator),
    }
    return {name: value.double() for name, value in values.items()}


def trained(
    norm: nn.Module, values: dict[str, Tensor], dtype: torch.dtype = torch.float32, relu: bool = False
) -> dict[str, Tensor]:
    """Returns the output, the gradients and the running statistics of one forward and backward pass."""
    last = isinstance(norm, BatchNorm3d)
    norm = norm.to(dtype).train()
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).copy_(values[name])
    x, grad = (values[name].to(dtype).contiguous() for name in ("x", "grad"))
    if last:
        x, grad = (tensor.contiguous(memory_format=LAST) for tensor in (x, grad))
    x = x.detach().clone().requires_grad_()
    y = norm(x, relu=relu) if isinstance(norm, BatchNorm3d | BatchNorm1d) else norm(x)
    if relu and not isinstance(norm, BatchNorm3d | BatchNorm1d):
        y = F.relu(y)
    y.backward(grad)
    return {
        "y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad,
        "running_mean": norm.running_mean, "running_var": norm.running_var,
    }  # fmt: skip


def error(values: Tensor, exact: Tensor) -> float:
    return (values.double() - exact).norm().item()


def assert_as_accurate(ours: dict, contiguous: dict, exact: dict, values: dict[str, Tensor]) -> None:
    """Asserts that errors are at most 1.5 times those of torch on contiguous memory, plus a rounding of the terms."""
    over = [axis for axis in range(values["x"].dim()) if axis != 1]
    std = values["x"].std(over, correction=0, keepdim=True)
    normal = (values["x"] - values["x"].mean(over, keepdim=True)) / std
    terms = exact | {
        "x": values["grad"] * values["weight"].view_as(std) / std,
        "weight": values["grad"] * normal,
        "bias": values["grad"],
        "running_mean": std + exact["running_mean"].view_as(std),
    }
    for name, truth in exact.items():
        assert error(ours[name], truth) <= 1.5 * error(contiguous[name], truth) + 1e-7 * terms[name].norm(), name


@pytest.mark.numerics
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_not_above_those_of_contiguous_torch(shape, relu):
    values, C = draw(shape), shape[1]
    exact = trained(nn.BatchNorm3d(C), values, torch.float64, relu)
    if relu:  # a rounding decides whether ReLU passes on the gradient of outputs near 0
        before = F.batch_norm(values["x"], None, None, values["weight"], values["bias"], True)
        values["grad"] *= before.abs() > 1e-4
        exact = trained(nn.BatchNorm3d(C), values, torch.float64, relu)
    contiguous = trained(nn.BatchNorm3d(C), values, relu=relu)
    ours = trained(BatchNorm3d(C), values, relu=relu)
    assert ours["y"].is_contiguous(memory_format=LAST) and ours["x"].is_contiguous(memory_format=LAST)
    assert_as_accurate(ours, contiguous, exact, values)


@pytest.mark.numerics
def test_long_sums_and_means_far_from_zero_lose_no_digits():
    """262,144 values per channel, whose mean is 1000 times their standard deviation: torch's channels-last kernel has
    errors of 1e-2 in y and 5e-1 in the gradient of the weight, its contiguous kernel 2e-5 and 6e-4."""
    values = draw((8, 4, 8, 64, 64), mean=1000.0)
    exact = trained(nn.BatchNorm3d(4), values, torch.float64)
    ours = trained(BatchNorm3d(4), values)
    for name, truth in exact.items():
        assert error(ours[name], truth) <= 3e-7 * truth.norm().item(), name


@pytest.mark.numerics
def test_equal_values_have_no_variance():
    x = torch.full((4, 3, 2, 9, 9), 0.1).contiguous(memory_format=LAST)
    norm = BatchNorm3d(3)
    torch.testing.assert_close(norm(x), torch.zeros_like(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(norm.running_var, torch.full((3,), 0.9))  # 0.9 of the initial 1


@pytest.mark.numerics
@pytest.mark.parametrize("rows", [2, 64, 1024, 5000])
def test_matrices(rows):
    """torch adds the rows of a matrix one by one, too, so the comparison is with its kernel for [1, C, rows]."""
    values = draw((rows, 37))
    exact = trained(nn.BatchNorm1d(37), values, torch.float64)
    ours = trained(BatchNorm1d(37), values)
    channels_first = {name: value.T[None] if value.dim() == 2 else value for name, value in values.items()}
    contiguous = trained(nn.BatchNorm1d(37), channels_first)  # [1, C, rows]
    contiguous |= {name: contiguous[name][0].T for name in ("y", "x")}
    assert_as_accurate(ours, contiguous, exact, values)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_spread_as_in_torch(bad, relu):
    values = draw((4, 5, 3, 20, 20))
    values["x"][1, 2, 1, 7, 3] = bad
    ours, theirs = (trained(norm(5), values, relu=relu) for norm in (BatchNorm3d, nn.BatchNorm3d))
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, equal_nan=True, msg=name, atol=1e-4, rtol=1e-4)
    values = draw((4, 5, 3, 20, 20))
    values["grad"][1, 2, 1, 7, 3] = bad
    ours, theirs = (trained(norm(5), values) for norm in (BatchNorm3d, nn.BatchNorm3d))
    for name, expected in theirs.items():
        assert torch.equal(ours[name].isfinite(), expected.isfinite()), name


def test_threads_and_instruction_sets_return_the_same_bits():
    values = draw((4, 24, 5, 41, 37))
    force = ctypes.CDLL(str(library.PATH)).cpr_force_cpu_variant
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(trained(BatchNorm3d(24), values, relu=True))
        for variant in _host.build_info()["cpu_variants"].split(","):
            assert force(variant.encode()) == 0
            results.append(trained(BatchNorm3d(24), values, relu=True))
    finally:
        torch.set_num_threads(before)
        force(None)
    for result in results[1:]:
        assert all(torch.equal(result[name], value) for name, value in results[0].items())


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"momentum": 0.0}, {"momentum": 1.0}, {"affine": False}, {"track_running_stats": False}],
    ids=str,
)
def test_state_is_that_of_torch(options):
    """Several batches in training, then one in evaluation; the state_dict loads both ways."""
    ours, theirs = BatchNorm3d(5, **options), nn.BatchNorm3d(5, **options)
    theirs.load_state_dict(ours.state_dict())
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(3, 5, 2, 6, 6).contiguous(memory_format=LAST)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    ours.load_state_dict(theirs.state_dict())
    x = x.abs()
    torch.testing.assert_close(ours.eval()(x, relu=True), F.relu(theirs.eval()(x)))


def test_shapes_that_torch_refuses_or_accepts():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        BatchNorm3d(3)(torch.zeros(1, 3, 1, 1, 1))
    for wrong in (torch.zeros(3), torch.zeros(2, 3), torch.zeros(2, 3, 4, 4)):
        with pytest.raises(ValueError, match="expected 5D input"):
            BatchNorm3d(3)(wrong)
    empty = torch.zeros(0, 3, 2, 4, 4).contiguous(memory_format=LAST)
    assert BatchNorm3d(3)(empty, relu=True).shape == empty.shape
    with pytest.raises((RuntimeError, ValueError), match="weight: expected shape .4., got .3.|running_mean"):
        BatchNorm3d(3)(torch.zeros(2, 4, 2, 4, 4).contiguous(memory_format=LAST))


@pytest.mark.parametrize("case", ["contiguous", "strided", "float64", "bfloat16", "float16", "no_channels_last_grad"])
def test_other_memory_and_dtypes_give_the_values_of_torch(case):
    """Where the kernel does not run, and where a gradient comes in other memory than x."""
    x, grad = torch.randn(3, 5, 4, 6, 6), torch.randn(3, 5, 4, 6, 6)
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(case, torch.float32)
    last = case not in ("contiguous", "strided")
    x, grad = x.to(dtype), grad.to(dtype)
    x = x.contiguous(memory_format=LAST) if last else x
    x, grad = (x[:, :, ::2], grad[:, :, ::2]) if case == "strided" else (x, grad)
    got = []
    for norm in (BatchNorm3d(5), nn.BatchNorm3d(5)):
        norm = norm.double() if dtype == torch.float64 else norm  # the weights of 16-bit inputs are float32
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = norm(leaf)
        y.backward(grad if case == "no_channels_last_grad" else grad.contiguous())
        got.append((y.detach(), leaf.grad, norm.weight.grad, norm.bias.grad, norm.running_var))
    for ours, theirs in zip(*got, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("relu", [False, True])
def test_autocast_keeps_bfloat16(relu):
    conv, norm = nn.Conv3d(3, 5, 1).to(memory_format=LAST), BatchNorm3d(5)
    x = torch.randn(2, 3, 4, 6, 6).contiguous(memory_format=LAST)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(conv(x), relu=relu)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert conv.weight.grad.isfinite().all()


def test_expanded_gradients_and_frozen_weights():
    x = draw((3, 5, 2, 6, 6))["x"].float().contiguous(memory_format=LAST)
    for weights, inputs in ((True, True), (False, True), (True, False)):
        got = []
        for norm in (BatchNorm3d(5), nn.BatchNorm3d(5)):
            norm.requires_grad_(weights)
            leaf = x.clone().requires_grad_(inputs)
            (norm(leaf) + leaf).mean((2, 3, 4)).pow(2).sum().backward()  # the mean expands the gradient
            got.append([tensor.grad for tensor in (leaf, norm.weight, norm.bias)])
        for ours, theirs in zip(*got, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("relu", [False, True])
def test_second_derivatives_are_those_of_torch(relu):
    x = torch.randn(3, 4, 2, 5, 5).contiguous(memory_format=LAST)
    seconds = []
    for norm in (BatchNorm3d(4), nn.BatchNorm3d(4)):
        leaf = x.clone().requires_grad_()
        y = norm(leaf, relu=relu) if isinstance(norm, BatchNorm3d) else (F.relu(norm(leaf)) if relu else norm(leaf))
        first = torch.autograd.grad(y.pow(3).sum(), (leaf, norm.weight), create_graph=True)
        (first[0].pow(2).sum() + first[1].sum()).backward()
        seconds.append((leaf.grad, norm.weight.grad))
    for ours, theirs in zip(*seconds, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's, on its first dual tensor
def test_transforms_and_compiled_programs_use_torch():
    norm, theirs = BatchNorm3d(4, track_running_stats=False), nn.BatchNorm3d(4, track_running_stats=False)
    x, tangent = (torch.randn(2, 4, 2, 5, 5).contiguous(memory_format=LAST) for _ in range(2))
    torch.testing.assert_close(torch.func.grad(lambda x: norm(x).pow(3).sum())(x),
                               torch.func.grad(lambda x: theirs(x).pow(3).sum())(x))  # fmt: skip
    with torch.autograd.forward_ad.dual_level():
        y = norm(torch.autograd.forward_ad.make_dual(x, tangent))
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, relu=True), norm(x, relu=True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "x: expected channels-last memory"),
        ({"x": torch.zeros(2, 3, dtype=torch.float64)}, "x: expected dtype float32"),
        ({"x": torch.zeros(3)}, r"x: expected shape \[N, C, ...\], got \[3\]"),
        ({"x": torch.zeros(0, 3)}, r"x: expected a non-empty tensor, got \[0, 3\]"),
        ({"weight": torch.zeros(2)}, r"weight: expected shape \[3\], got \[2\]"),
        ({"bias": torch.zeros(3, dtype=torch.float64)}, "bias: expected dtype float32"),
        ({"running_mean": torch.zeros(6)[::2]}, "running_mean: expected dense float32"),
    ],
)
def test_the_operator_itself_checks_its_arguments(arguments, message):
    given = {"x": torch.zeros(2, 3), "weight": None, "bias": None, "running_mean": None, "running_var": None}
    with pytest.raises((ValueError, RuntimeError), match=message):
        batch_norm._forward(*(given | arguments).values(), 0.1, 1e-5, False)
