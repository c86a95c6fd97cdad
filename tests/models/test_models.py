"""Tests the networks and their heads: published counts and shapes, and the layouts and sizes that training uses."""

from __future__ import annotations

import copy
import math
import warnings
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpr_fast.config import ModelConfig
from cpr_fast.errors import InputError
from cpr_fast.models import C3D, R3D, S3D, ProjectionHead, R2Plus1D, build_encoder
from cpr_fast.models.r3d import PaddedConv3d
from cpr_fast.models.s3d import TemporalConv


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return build_encoder(ModelConfig(width=0.125, feature_dim=16)).eval()


def test_width_one_has_the_published_parameters_and_tensors():
    with torch.device("meta"):
        network = S3D()
    assert sum(p.numel() for p in network.parameters()) == 7_910_048  # "7.91 M"
    state = network.state_dict()
    assert len(state) == 462
    for name, shape in {
        "Conv_1a.conv1.weight": (64, 3, 1, 7, 7),
        "Conv_1a.conv2.weight": (64, 64, 7, 1, 1),
        "Conv_2b.bn.running_var": (64,),
        "Conv_2c.bn2.weight": (192,),
        "Mixed_4d.branch1.1.conv2.weight": (256, 256, 3, 1, 1),
        "Mixed_5c.branch3.1.conv.weight": (128, 832, 1, 1, 1),
    }.items():
        assert tuple(state[name].shape) == shape, name


def test_block_shapes_at_width_one():
    network, shapes = S3D().eval(), {}
    for name, module in network.named_children():
        module.register_forward_hook(lambda _m, _i, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 128, 128))
    assert shapes["Conv_1a"] == (64, 16, 64, 64)
    assert shapes["Conv_2c"] == (192, 16, 32, 32)
    assert shapes["Mixed_3c"] == (480, 16, 16, 16)
    assert shapes["Mixed_4f"] == (832, 8, 8, 8)
    assert shapes["Mixed_5c"] == (1024, 4, 4, 4)


def test_initialisation_and_batch_norm():
    torch.manual_seed(0)
    network = S3D(0.5)
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            assert module.bias is None
            assert module.weight.mean().abs() < 0.002
            assert 0.008 < module.weight.std() < 0.012
        if isinstance(module, nn.BatchNorm3d):
            assert (module.eps, module.momentum) == (1e-5, 0.1)


@pytest.mark.parametrize("width", [0.125, 0.25, 0.3, 2.0])
def test_width_scales_every_channel_to_a_multiple_of_eight(width):
    with torch.device("meta"):
        network = S3D(width)
    channels = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv3d)]
    assert all(c % 8 == 0 and c >= 8 for c in channels)
    assert network.out_channels == pytest.approx(1024 * width, rel=0.05)


@pytest.mark.parametrize("shape", [(2, 3, 8, 64, 64), (1, 3, 5, 17, 17), (3, 3, 9, 33, 50)])
def test_small_and_odd_clips(small, shape):
    clips = torch.randn(shape)
    with torch.no_grad():
        projected, features = small(clips), small.features(clips)
        torch.testing.assert_close(features, small.backbone(clips).mean((2, 3, 4)), atol=1e-6, rtol=1e-4)
    assert projected.shape == (shape[0], 16)
    assert features.shape == (shape[0], small.backbone.out_channels)
    torch.testing.assert_close(projected.norm(dim=1), torch.ones(shape[0]))


@pytest.mark.parametrize("shape", [(3, 8, 64, 64), (1, 1, 8, 64, 64), (1, 3, 4, 64, 64), (1, 3, 8, 16, 64)])
def test_clips_that_do_not_fit_are_named(small, shape):
    with pytest.raises(ValueError, match=r"x: expected \[N, 3, T >= 5.*got"):
        small.backbone(torch.zeros(shape))


def test_separable_block_is_a_spatial_then_a_temporal_convolution(small):
    """Compares with the definition in float64: relu(bn(conv_t(relu(bn(conv_s(x)))))), with BatchNorm as a formula."""

    def norm_relu(x, bn):
        scale = (bn.weight / (bn.running_var + bn.eps).sqrt()).double()
        return ((x - bn.running_mean.double().view(-1, 1, 1, 1)) * scale.view(-1, 1, 1, 1)).clamp(min=0)

    block = small.backbone.Conv_1a
    x = torch.randn(1, 3, 7, 20, 18)
    y = norm_relu(F.conv3d(x.double(), block.conv1.weight.double(), None, (1, 2, 2), (0, 3, 3)), block.bn1)
    y = norm_relu(F.conv3d(y, block.conv2.weight.double(), None, (2, 1, 1), (3, 0, 0)), block.bn2)
    with torch.no_grad():
        torch.testing.assert_close(block(x).double(), y, atol=1e-5, rtol=1e-4)


def value_and_gradients(convolve, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    y = convolve(x, weight)
    y.backward(grad)
    return [y.detach().double(), x.grad.double(), weight.grad.double()]


def assert_as_exact_as_torch(convolution: nn.Conv3d, frames: int) -> None:
    """Asserts that errors against a float64 conv3d are at most twice those of torch's kernels without oneDNN in the
    same dtype, plus one rounding of the result and the rounding of a float32 sum of that many terms in any order.

    Errors are relative to the largest entry. A processor without bf16 instructions rounds partial sums to bf16, too.
    """
    generator = torch.Generator().manual_seed(frames)
    dtype, channels = convolution.weight.dtype, convolution.in_channels
    x = torch.randn(4, channels, frames, 5, 5, generator=generator, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    grad = torch.randn(convolution(x).shape, generator=generator, dtype=dtype)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv3d(x, weight, None, convolution.stride, convolution.padding)

    weight = convolution.weight
    ours = value_and_gradients(lambda x, w: torch.func.functional_call(convolution, {"weight": w}, x), x, weight, grad)
    with warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=False):
        same_dtype = value_and_gradients(plain, x, weight, grad)
    exact = value_and_gradients(plain, x.double(), weight.double(), grad.double())
    terms = max(channels * math.prod(convolution.kernel_size), grad.numel() // channels)
    floor = torch.finfo(dtype).eps + math.sqrt(terms) * torch.finfo(torch.float32).eps
    for name, x, y, truth in zip(("y", "x", "weight"), ours, same_dtype, exact, strict=True):
        bound = 2 * (y - truth).abs().max() + floor * truth.abs().max()
        assert (x - truth).abs().max() <= bound, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (7, 2)])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_temporal_convolution_of_few_frames(frames, kernel, stride, dtype):
    """Tests the value and both gradients; oneDNN's 3-D gradient is wrong for these sizes."""
    torch.manual_seed(frames)
    assert_as_exact_as_torch(TemporalConv(16, kernel, stride).to(dtype), frames)


def test_head_is_the_published_one_written_with_convolutions():
    head = ProjectionHead(12, 5)
    pooled = torch.randn(4, 12)
    first, second = (head[i].weight.view(*head[i].weight.shape, 1, 1, 1) for i in (0, 2))
    y = F.conv3d(pooled.view(4, 12, 1, 1, 1), first, head[0].bias).relu()
    y = F.conv3d(y, second, head[2].bias).flatten(1)
    torch.testing.assert_close(head(pooled), y / y.norm(dim=1, keepdim=True))


def test_autocast_returns_unit_float32_and_weights_stay_channels_last(small):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        projected = small(torch.randn(2, 3, 8, 32, 32))
    assert projected.dtype == torch.float32
    torch.testing.assert_close(projected.norm(dim=1), torch.ones(2))
    assert small.backbone.Conv_1a.conv1.weight.is_contiguous(memory_format=torch.channels_last_3d)


# ---- the backbones of IIC, and S3D-G ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "parameters", "tensors", "shape"),
    [
        (R3D, 14_361_792, 72, (512, 2, 7, 7)),  # "14.36 M"; 512 x 2 x 3 x 3 = 9,216 after IIC's spatial max pool
        (R2Plus1D, 14_365_303, 144, (512, 2, 7, 7)),  # "14.37 M"
        (C3D, 27_661_440, 56, (512, 2, 7, 7)),  # "27.66 M"
        (lambda: S3D(gating=True), 9_098_000, 534, (1024, 2, 3, 3)),
    ],
    ids=["r3d", "r21d", "c3d", "s3dg"],
)
def test_published_counts_and_shapes(network, parameters, tensors, shape):
    with torch.device("meta"):
        network = network()
        assert tuple(network(torch.zeros(1, 3, 16, 112, 112)).shape[1:]) == shape
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == tensors


def test_module_names_are_those_of_the_published_weights():
    with torch.device("meta"):
        joint, split, c3d = R3D().state_dict(), R2Plus1D().state_dict(), C3D().state_dict()
    assert tuple(joint["conv1.temporal_spatial_conv.weight"].shape) == (64, 3, 3, 7, 7)
    assert tuple(joint["conv3.block1.downsampleconv.temporal_spatial_conv.weight"].shape) == (128, 64, 1, 1, 1)
    assert tuple(split["conv1.spatial_conv.weight"].shape) == (83, 3, 1, 7, 7)
    assert tuple(split["conv5.block1.conv2.temporal_conv.weight"].shape) == (512, 1152, 3, 1, 1)
    assert tuple(c3d["conv4a.bias"].shape) == tuple(c3d["bn4a.weight"].shape) == (512,)


def reference_conv(x, conv):
    return F.conv3d(x, conv.weight.double(), None, conv.stride, conv.padding)


def reference_norm(x, bn):
    shape = (1, -1, 1, 1, 1)
    scale = (bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()).view(shape)
    return (x - bn.running_mean.double().view(shape)) * scale + bn.bias.double().view(shape)


def test_residual_blocks_against_their_definition_in_float64():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 7, 6)

    def conv(x, module):
        if hasattr(module, "temporal_spatial_conv"):
            return reference_conv(x, module.temporal_spatial_conv)
        middle = reference_norm(reference_conv(x, module.spatial_conv), module.bn).relu()
        return reference_conv(middle, module.temporal_conv)

    for network in (R3D(0.125), R2Plus1D(0.125)):
        block = network.eval().conv3.block1
        x64 = x.double()
        y = reference_norm(conv(x64, block.conv1), block.bn1).relu()
        y = reference_norm(conv(y, block.conv2), block.bn2)
        y = (y + reference_norm(conv(x64, block.downsampleconv), block.downsamplebn)).relu()
        with torch.no_grad():
            torch.testing.assert_close(block(x).double(), y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((3, 3, 3), (1, 1, 1), (1, 1, 1)), ((3, 3, 3), (2, 2, 2), (1, 1, 1)), ((3, 1, 1), (2, 1, 1), (1, 0, 0))],
)
@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_padded_convolution_of_few_frames(frames, kernel, stride, padding, dtype):
    """Tests the value and both gradients; oneDNN's padding writes outside its memory for these sizes."""
    torch.manual_seed(frames)
    assert_as_exact_as_torch(PaddedConv3d(16, 16, kernel, stride, padding, bias=False).to(dtype), frames)


def test_gating_scales_each_channel_by_a_sigmoid_of_all_means():
    torch.manual_seed(0)
    gate = S3D(0.125, gating=True).Mixed_3b.gating_b1
    x = torch.randn(2, gate.fc.in_features, 3, 4, 5)
    logits = x.double().mean((2, 3, 4)) @ gate.fc.weight.double().T + gate.fc.bias.double()
    expected = x.double() / (1 + (-logits).exp())[:, :, None, None, None]
    torch.testing.assert_close(gate(x).double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("arch", ["s3dg", "r3d", "r21d", "c3d"])
@pytest.mark.parametrize("shape", [(2, 3, 8, 32, 32), (3, 3, 9, 17, 33)])
def test_other_backbones_train_on_small_and_odd_clips(arch, shape):
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(arch=arch, width=0.125, feature_dim=16))
    features = encoder.features(torch.randn(shape))
    assert features.shape == (shape[0], encoder.backbone.out_channels)
    projected = encoder(torch.randn(shape))
    torch.testing.assert_close(projected.norm(dim=1), torch.ones(shape[0]))
    projected[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("arch", ["r3d", "r21d", "c3d"])
@pytest.mark.parametrize("shape", [(3, 8, 64, 64), (1, 1, 8, 64, 64), (1, 3, 7, 64, 64), (1, 3, 8, 15, 64)])
def test_clips_too_small_for_the_other_backbones_are_named(arch, shape):
    encoder = build_encoder(ModelConfig(arch=arch, width=0.125, feature_dim=16))
    with pytest.raises(ValueError, match=r"x: expected \[N, 3, T >= 8.*got"):
        encoder.backbone(torch.zeros(shape))


def test_heads_without_weights():
    torch.manual_seed(0)
    clips = torch.randn(2, 3, 8, 32, 32)
    for head in ("unit", "pooled"):
        encoder = build_encoder(ModelConfig(arch="r3d", width=0.125, head=head, feature_dim=64)).eval()
        with torch.no_grad():
            features, got = encoder.features(clips), encoder(clips)
        expected = features / features.norm(dim=1, keepdim=True) if head == "unit" else features
        torch.testing.assert_close(got, expected)
        assert not list(encoder.head.parameters())
    with pytest.raises(
        InputError,
        match=r"model.feature_dim: expected 64, the width of the pooled .*'r3d' at model.width 0.125.*got 128",
    ):
        build_encoder(ModelConfig(arch="r3d", width=0.125, head="unit"))


# ---- training on the CPU ---------------------------------------------------------------------------


@pytest.mark.numerics
@pytest.mark.parametrize("arch", ["s3d", "r3d"])
def test_features_in_training_are_as_near_to_float64_as_contiguous_torch(arch):
    """Gradients jump with the slightest difference near the corners of ReLU and max pooling: the tests of the operator
    compare them without those."""
    torch.manual_seed(0)
    backbone = build_encoder(ModelConfig(arch=arch, width=0.125, feature_dim=16)).backbone
    clips = torch.randn(4, 3, 8, 64, 64)

    def features(dtype: torch.dtype, memory: torch.memory_format) -> Tensor:
        network = copy.deepcopy(backbone).to(dtype).to(memory_format=memory)
        with torch.no_grad():
            return network(clips.to(dtype).contiguous(memory_format=memory)).mean((2, 3, 4)).double()

    exact, contiguous, ours = (
        features(*form)
        for form in (
            (torch.float64, torch.contiguous_format),
            (torch.float32, torch.contiguous_format),
            (torch.float32, torch.channels_last_3d),
        )
    )
    assert (ours - exact).norm() <= 2 * (contiguous - exact).norm() + 1e-6 * exact.norm()


def test_every_batch_norm_of_a_training_encoder_runs_the_accurate_kernel():
    """A convolution that returned other memory would make torch's kernel run.

    With one thread and fewer than 16 clips torch computes some convolutions in contiguous memory, where its BatchNorm
    is accurate as well.
    """
    for arch in ("s3d", "s3dg", "s3d_milnce", "r3d", "r21d", "c3d"):
        encoder = build_encoder(ModelConfig(arch=arch, width=0.125, feature_dim=16))
        norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        with mock.patch.object(F, "batch_norm", side_effect=AssertionError("torch's kernel")):
            encoder(torch.randn(16, 3, 8, 32, 32)).sum().backward()
        assert len(norms) >= 8 and all(norm.num_batches_tracked == 1 for norm in norms)
