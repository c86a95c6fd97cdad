"""Compares value and gradient of mil_nce with a learned temperature with plain PyTorch in float64."""

import re

import pytest
import torch
from torch.nn.functional import normalize

from cpr_fast.ops import mil_nce, mil_nce_ref


def problem(dtype=torch.float32, device="cpu", B=7, K=90, D=24):
    generator = torch.Generator().manual_seed(0)
    features = [normalize(torch.randn(n, D, generator=generator, dtype=torch.float64), dim=1) for n in (B, B, K)]
    positives = torch.randint(-1, K, (B, 3), generator=generator)
    ids = {"query_ids": torch.randint(-1, 5, (B,), generator=generator),
           "memory_ids": torch.randint(-1, 5, (K,), generator=generator)}  # fmt: skip
    return [x.to(device, dtype) for x in features], positives.to(device), {k: v.to(device) for k, v in ids.items()}


USES = {  # temperatures computed from a learned number x, near .1
    "temperature": (0.1, lambda x: x),
    "one element": (0.1, lambda x: x.reshape(1)),
    "logarithm": (-2.3, lambda x: x.exp()),
    "scale of the logits": (2.3, lambda x: 1 / x.exp()),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_to_the_temperature(device, dtype, use, reduction):
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("float64 runs on the CPU only")
    features, positives, ids = problem(dtype, device)
    start, temperature = USES[use]
    results = []
    for function, inputs in ((mil_nce, features), (mil_nce_ref, [x.double() for x in features])):
        learned = torch.tensor(start, dtype=inputs[0].dtype, device=device, requires_grad=True)
        wide = learned.double() if function is mil_nce_ref else learned
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = function(*leaves, positives, temperature=temperature(wide), reduction=reduction, **ids)
        (loss * torch.linspace(-1, 2, loss.numel(), device=device).reshape(loss.shape)).sum().backward()
        results.append([loss.detach(), learned.grad, *(x.grad for x in leaves)])
    narrow = torch.finfo(dtype).eps
    tolerance = 100 * narrow if dtype.itemsize == 2 else 1e-10 if dtype == torch.float64 else 1e-4
    for found, expected in zip(*results, strict=True):
        scale = max(1.0, expected.abs().max().item())
        assert (found.double() - expected.double()).abs().max() <= tolerance * scale


def test_gradcheck():
    features, positives, ids = problem(torch.float64, B=4, K=30, D=5)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    leaves = [x.requires_grad_() for x in features]
    for mode in ("keep", "denominator", "drop_both"):
        options = ids | {"self_positive": mode, "reduction": "none"}
        assert torch.autograd.gradcheck(
            lambda t, *x: mil_nce(*x, positives, temperature=t, **options),  # noqa: B023
            (temperature, *leaves),
        )


def test_the_gradient_is_the_one_of_eulers_identity():
    """t dL/dt = -sum(q dL/dq): the loss depends on both only through q / t."""
    (query, own_key, memory), positives, ids = problem(torch.float64)
    query.requires_grad_()
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    mil_nce(query, own_key, memory, positives, temperature=temperature, **ids).backward()
    torch.testing.assert_close(temperature * temperature.grad, -(query * query.grad).sum())


def test_value_is_that_of_a_number(device):
    features, positives, ids = problem(device=device)
    as_tensor = mil_nce(*features, positives, temperature=torch.tensor(0.07, device=device), **ids)
    torch.testing.assert_close(as_tensor, mil_nce(*features, positives, temperature=0.07, **ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.01, 0.07, 1.0])
def test_dividing_the_query_is_as_exact_as_dividing_the_scores(device, value):
    """The error against float64 of the loss and of its gradient to the temperature is at most twice that of plain
    torch, plus one rounding: the bound of mil_nce itself."""
    features, positives, ids = problem(device=device, B=33, K=300, D=128)
    results = []
    for function, dtype in ((mil_nce_ref, torch.float64), (mil_nce_ref, torch.float32), (mil_nce, torch.float32)):
        temperature = torch.tensor(value, device=device).to(dtype).requires_grad_()
        loss = function(*[x.to(dtype) for x in features], positives, temperature=temperature, **ids)
        results.append([x.double() for x in (loss.detach(), *torch.autograd.grad(loss, temperature))])
    truth, plain, found = results
    for i in range(2):
        bound = 2 * (plain[i] - truth[i]).abs() + 4 * torch.finfo(torch.float32).eps * (1 + truth[i].abs() / value)
        assert (found[i] - truth[i]).abs() <= bound


def test_the_gradient_does_not_depend_on_the_number_of_threads():
    """torch divides a sum of more than 32,768 elements among its threads; here B x D = 131,072."""
    features, positives, ids = problem(B=1024, K=70, D=128)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            temperature = torch.tensor(0.1, requires_grad=True)
            loss = mil_nce(*features, positives, temperature=temperature, **ids)
            found.append([loss.detach(), *torch.autograd.grad(loss, temperature)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, found[0], strict=True))


def test_vmap_over_temperatures():
    features, positives, ids = problem()
    results = []
    for function in (mil_nce, mil_nce_ref):
        temperatures = torch.tensor([0.07, 0.2, 1.0], requires_grad=True)
        loss = torch.vmap(lambda t: function(*features, positives, temperature=t, **ids))(temperatures)  # noqa: B023
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), temperatures)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("where", ["meta", "cpu"])
def test_the_value_is_not_read_on_a_device(where):
    """Reading a value of a meta tensor raises an error, as it would break the capture of a CUDA graph. A temperature on
    the CPU can be used with features on a device."""
    features, positives, ids = problem(device="meta")
    temperature = torch.tensor(0.1, device=where, requires_grad=True)
    ids = {name: values.to("meta") for name, values in ids.items()}
    loss = mil_nce(*features, positives, temperature=temperature, reduction="none", **ids)
    assert loss.is_meta and loss.shape == (7,) and loss.dtype == torch.float32 and loss.requires_grad


def test_compiles_into_one_graph(device):
    features, positives, ids = problem(device=device)

    def loss(log_scale, *features):
        return mil_nce(*features, positives, temperature=1 / log_scale.exp(), **ids)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [torch.tensor(2.3, device=device).requires_grad_()] + [x.clone().requires_grad_() for x in features]
        value = function(*leaves)
        value.backward()
        results.append([value.detach(), *(x.grad for x in leaves)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


def test_autocast(device):
    features, positives, ids = problem(torch.bfloat16, device)
    temperature = torch.tensor(0.1, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = mil_nce(features[0].float(), *features[1:], positives, temperature=temperature, **ids)
    loss.backward()
    assert loss.dtype == torch.float32 and temperature.grad.isfinite() and temperature.grad != 0


@pytest.mark.parametrize(
    ("temperature", "error"),
    [
        (torch.tensor(0.0), ValueError),
        (torch.tensor(-0.1), ValueError),
        (torch.tensor(torch.nan), ValueError),
        (torch.tensor(torch.inf), ValueError),
        (torch.tensor([0.1, 0.2]), ValueError),
        (torch.tensor([]), ValueError),
        (torch.tensor(1), TypeError),
        (torch.tensor(True), TypeError),
        (torch.tensor(0.1, device="meta"), ValueError),
        (torch.tensor(0.1).to_sparse(), TypeError),
        (torch.tensor(0.1 + 1j), TypeError),
    ],
)
def test_what_is_no_temperature_is_refused(temperature, error):
    features, positives, _ = problem()
    with pytest.raises(error, match="temperature: expected"):
        mil_nce(*features, positives, temperature=temperature)


@pytest.mark.parametrize("shape", [(), (8,), (1, 7, 8)])
def test_a_query_of_another_shape_is_named(shape):
    with pytest.raises(ValueError, match=re.escape(f"query: expected a non-empty shape [B, D], got {list(shape)}")):
        mil_nce(torch.rand(shape), torch.rand(7, 8), torch.rand(9, 8), temperature=torch.tensor(0.1))


def test_a_temperature_that_is_not_positive_gives_nan_where_it_is_not_read():
    features, positives, _ = problem()
    compiled = torch.compile(lambda t: mil_nce(*features, positives, temperature=t), fullgraph=True, backend="eager")
    assert compiled(torch.tensor(-0.1)).isnan()


def test_mixed_dtypes_are_still_refused():
    (query, own_key, memory), _, _ = problem()
    with pytest.raises(TypeError, match="own_key: expected the dtype of query"):
        mil_nce(query.bfloat16(), own_key, memory, temperature=torch.tensor(0.1))
