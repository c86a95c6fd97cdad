"""The linear layers of feature training against exact products."""

import pytest
import torch
from torch.nn import functional as F

from cpr_fast.models.heads import HostLinear


@pytest.mark.parametrize(("rows", "width", "out"), [(1, 1, 1), (33, 37, 5), (130, 768, 128), (0, 5, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_a_linear_layer(rows: int, width: int, out: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = HostLinear(width, out, bias=bias)
    features, grad = torch.randn(rows, width, requires_grad=True), torch.randn(out, rows).T
    inputs = [features, *layer.parameters()]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    expected = F.linear(*exact)
    found = layer(features)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)
    for own, reference in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        torch.testing.assert_close(own.double(), reference, atol=3e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "features",
    [
        torch.randn(33, 2, 37)[:, 1],
        torch.randn(66, 37)[::2],
        torch.randn(33, 40)[:, 3:],
        torch.randn(37, 33).T,
        torch.randn(37, 40)[:, :33].T,
        torch.randn(37).expand(33, 37),
        torch.randn(33, 1).expand(33, 37),
    ],
    ids=["sample of siblings", "every second", "columns", "transposed", "transposed part", "one row", "one column"],
)
def test_no_layout_of_the_features_is_multiplied_by_reference_loops(
    features: torch.Tensor, capfd: pytest.CaptureFixture[str]
) -> None:
    layer = HostLinear(37, 5)
    features = features.detach().requires_grad_()
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        found = layer(features)
        torch.autograd.grad(found, [features, *layer.parameters()], torch.randn(5, 33).T)
    text = capfd.readouterr().out
    assert text.count("inner_product") >= 3
    assert ",ref" not in text
    torch.testing.assert_close(found, F.linear(features, layer.weight, layer.bias))


def test_a_frozen_layer_passes_the_gradient_on_and_gets_none() -> None:
    layer = HostLinear(6, 4).requires_grad_(False)
    features = torch.randn(5, 6, requires_grad=True)
    layer(features).sum().backward()
    torch.testing.assert_close(features.grad, layer.weight.sum(0).expand(5, 6))
    assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("shape", [(6,), (2, 3, 6)])
def test_other_shapes_dtypes_and_autocast_are_left_to_torch(shape: tuple[int, ...]) -> None:
    layer, features = HostLinear(6, 4), torch.randn(shape)
    plain = torch.nn.Linear(6, 4)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(features), plain(features))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(torch.randn(3, 6))
        assert half.dtype == torch.bfloat16
    assert layer.double()(torch.randn(2, 6, dtype=torch.float64)).dtype == torch.float64


def test_it_can_be_exported() -> None:
    layer, features = HostLinear(6, 4), torch.randn(3, 6)
    program = torch.export.export(layer, (features,))
    assert "mkldnn" not in str(program.graph)
    torch.testing.assert_close(program.module()(features), layer(features))
