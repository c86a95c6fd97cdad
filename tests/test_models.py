"""S3D and its head: the published counts and shapes, and the layouts and sizes that training uses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cpr_fast.config import ModelConfig
from cpr_fast.models import S3D, ProjectionHead, build_encoder
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
    """Against the definition in float64: relu(bn(conv_t(relu(bn(conv_s(x)))))), BatchNorm written out."""

    def norm_relu(x, bn):
        scale = (bn.weight / (bn.running_var + bn.eps).sqrt()).double()
        return ((x - bn.running_mean.double().view(-1, 1, 1, 1)) * scale.view(-1, 1, 1, 1)).clamp(min=0)

    block = small.backbone.Conv_1a
    x = torch.randn(1, 3, 7, 20, 18)
    y = norm_relu(F.conv3d(x.double(), block.conv1.weight.double(), None, (1, 2, 2), (0, 3, 3)), block.bn1)
    y = norm_relu(F.conv3d(y, block.conv2.weight.double(), None, (2, 1, 1), (3, 0, 0)), block.bn2)
    with torch.no_grad():
        torch.testing.assert_close(block(x).double(), y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (7, 2)])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_temporal_convolution_of_few_frames(frames, kernel, stride, dtype):
    """Value and both gradients against a float64 conv3d; the library's own 3-D gradient fails here."""
    generator = torch.Generator().manual_seed(frames)
    convolution = TemporalConv(16, kernel, stride).to(dtype)
    x = torch.randn(4, 16, frames, 5, 5, generator=generator, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    y = convolution(x)
    grad = torch.randn(y.shape, generator=generator, dtype=dtype)
    y.backward(grad)
    x64, weight64 = x.detach().double().requires_grad_(), convolution.weight.detach().double().requires_grad_()
    y64 = F.conv3d(x64, weight64, None, (stride, 1, 1), (kernel // 2, 0, 0))
    y64.backward(grad.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for got, expected in ((y, y64), (x.grad, x64.grad), (convolution.weight.grad, weight64.grad)):
        assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max()


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
