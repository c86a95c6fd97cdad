"""Compares cascade_mil_nce with two calls, bit for bit, and with plain PyTorch in float64."""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from cpr_fast.ops import cascade_mil_nce, cascade_mil_nce_ref, cascade_select, mil_nce

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(V=2, B=7, K=90, D=24, *, seed=0, dtype=torch.float32, device="cpu", ids=True):
    """queries, own_key, memory, and keyword arguments with ids."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((V, B, D), (B, D), (V, K, D))
    features = [normalize(torch.randn(shape, generator=generator), dim=-1).to(device, dtype) for shape in shapes]
    if not ids:
        return features, {}
    query_ids, memory_ids = (torch.randint(-1, 5, (size,), generator=generator).to(device) for size in (B, K))
    return features, {"query_ids": query_ids, "memory_ids": memory_ids}


def two_calls(queries, own_key, memory, views, keep, *, view=0, query=None, query_ids=None, memory_ids=None, **loss):
    ids = {"query_ids": query_ids, "memory_ids": memory_ids}
    indices, _ = cascade_select(queries, memory, views, keep, **ids)
    query = queries[view] if query is None else query
    return mil_nce(query, own_key, memory[view], indices, **ids, **loss), indices


def results(function, features, *cascade, **options):
    """Returns loss, indices and the gradients to queries, own_key and memory."""
    leaves = [x.detach().clone().requires_grad_() for x in features]
    loss, indices = function(*leaves, *cascade, **options)
    weights = torch.linspace(-1, 2, loss.numel(), device=loss.device).reshape(loss.shape)
    return [loss.detach(), indices, *torch.autograd.grad((loss * weights).sum(), leaves)]


def assert_equal(found, expected):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("V", "B", "K", "D", "views", "view"),
    [
        (1, 1, 1, 1, [0], 0),
        (2, 3, 65, 7, [1, 0, 1], 0),
        (2, 33, 300, 128, [1, 0, 1], 1),
        (2, 49, 2500, 40, [1, 0, 1, 0, 1], 0),
        (3, 17, 130, 24, [2, 0], 1),  # no stage compares in the view of the loss
        (3, 16, 1100, 33, [0, 1, 2], 2),
        (2, 5, 70, 16, [1], 0),
    ],
)
def test_the_bits_of_two_calls(device, dtype, V, B, K, D, views, view):
    keep = [max(5, K >> s) for s in range(1, len(views))] + [5]
    for with_ids, reduction in itertools.product((True, False), ("mean", "none")):
        features, ids = problem(V, B, K, D, dtype=dtype, device=device, ids=with_ids)
        arguments = (features, views, keep)
        options = ids | {"view": view, "reduction": reduction}
        assert_equal(results(cascade_mil_nce, *arguments, **options), results(two_calls, *arguments, **options))


@pytest.mark.parametrize("same_id", ["positive", "ignore", "negative"])
@pytest.mark.parametrize("self_positive", ["keep", "denominator", "drop_both", "rows"])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1, "tensor"])
def test_every_meaning_of_ids_and_own_key(device, same_id, self_positive, temperature):
    features, ids = problem(B=19, K=130, device=device, seed=4)
    modes = torch.arange(19, device=device) % 3
    options = ids | {"same_id": same_id, "self_positive": modes if self_positive == "rows" else self_positive}
    options["temperature"] = torch.tensor(0.1, device=device) if temperature == "tensor" else temperature
    arguments = (features, [1, 0, 1], [60, 30, 4])
    assert_equal(results(cascade_mil_nce, *arguments, **options), results(two_calls, *arguments, **options))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_cascade(data):
    """Many scores are equal, and the memory may have empty slots and NaN in any place."""
    V, B, K, D = (data.draw(st.integers(1, high)) for high in (3, 40, 150, 9))
    n = data.draw(st.integers(1, 5))
    views = data.draw(st.lists(st.integers(0, V - 1), min_size=n, max_size=n))
    keep = sorted(data.draw(st.lists(st.integers(1, K + 20), min_size=n, max_size=n)), reverse=True)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    features = [torch.randint(-8, 9, shape, generator=generator) / 4 for shape in ((V, B, D), (B, D), (V, K, D))]
    query_ids, memory_ids = (torch.randint(-1, 3, (size,), generator=generator) for size in (B, K))
    features[2][:, memory_ids == -1] = torch.nan
    if data.draw(st.booleans()):
        features[2][data.draw(st.integers(0, V - 1)), data.draw(st.integers(0, K - 1)), 0] = torch.nan
    options = {"query_ids": query_ids, "memory_ids": memory_ids, "view": data.draw(st.integers(0, V - 1))}
    options["same_id"] = data.draw(st.sampled_from(["positive", "ignore", "negative"]))
    arguments = (features, views, keep)
    assert_equal(results(cascade_mil_nce, *arguments, **options), results(two_calls, *arguments, **options))


@pytest.mark.parametrize("self_positive", ["keep", "denominator"])
def test_against_float64(device, self_positive):
    """The error is at most twice that of plain torch in float32, plus one rounding: the bound of mil_nce."""
    features, ids = problem(B=33, K=300, D=128, device=device)
    options = ids | {"self_positive": self_positive, "reduction": "none"}
    arguments = ([1, 0, 1], [150, 75, 5])
    found = results(cascade_mil_nce, features, *arguments, **options)
    plain = results(cascade_mil_nce_ref, features, *arguments, **options)
    truth = results(cascade_mil_nce_ref, [x.double() for x in features], *arguments, **options)
    assert torch.equal(found[1], truth[1])
    for x, y, exact in zip(found, plain, truth, strict=True):
        bound = 2 * (y.double() - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * (1 + exact.abs().max())
        assert (x.double() - exact).abs().max() <= bound


def test_threads_and_batch_do_not_change_the_bits():
    features, ids = problem(B=70, K=3000, D=16)
    arguments, threads = (features, [1, 0, 1], [1500, 700, 5]), torch.get_num_threads()
    expected = results(cascade_mil_nce, *arguments, reduction="none", **ids)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_equal(results(cascade_mil_nce, *arguments, reduction="none", **ids), expected)
    finally:
        torch.set_num_threads(threads)
    (queries, own_key, memory), rows = features, slice(20, 51)
    alone = cascade_mil_nce(
        queries[:, rows], own_key[rows], memory, *arguments[1:], reduction="none",
        query_ids=ids["query_ids"][rows], memory_ids=ids["memory_ids"],
    )  # fmt: skip
    assert_equal(alone, [x[rows] for x in expected[:2]])


def test_another_query_of_the_loss(device):
    """The cascade of the paper compares the keys of the momentum encoder, and the loss the query."""
    features, ids = problem(device=device)
    cascade, results = ([1, 0, 1], [45, 22, 5]), []
    for function in (cascade_mil_nce, two_calls):
        query = normalize(torch.randn(7, 24, generator=torch.Generator().manual_seed(9)), dim=1).to(device)
        query.requires_grad_()
        loss, indices = function(*features, *cascade, query=query, **ids)
        results.append([loss.detach(), indices, *torch.autograd.grad(loss, query)])
    assert_equal(*results)
    _, indices = cascade_mil_nce(*features, *cascade, **ids)
    assert torch.equal(indices, results[0][1])


def test_strides_do_not_matter(device):
    features, ids = problem(device=device)
    strided = [torch.stack([x, x], -1)[..., 0] for x in features]
    assert not any(x.is_contiguous() for x in strided)
    expected = cascade_mil_nce(*features, [1, 0], [40, 5], **ids)
    assert_equal(cascade_mil_nce(*strided, [1, 0], [40, 5], **ids), expected)


def test_the_memory_may_be_overwritten_unless_it_learns(device):
    (queries, own_key, memory), _ = problem(device=device)
    queries.requires_grad_()
    loss, _ = cascade_mil_nce(queries, own_key, memory, [1, 0], [40, 5])
    expected = torch.autograd.grad(loss, queries, retain_graph=True)[0]
    memory.zero_()
    assert torch.equal(torch.autograd.grad(loss, queries)[0], expected)
    learned = memory.clone().requires_grad_()
    loss, _ = cascade_mil_nce(queries, own_key, learned, [1, 0], [40, 5])
    with torch.no_grad():
        learned.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_differentiating_twice_is_refused(device):
    (queries, own_key, memory), _ = problem(device=device)
    loss, _ = cascade_mil_nce(queries.requires_grad_(), own_key, memory, [1, 0], [40, 5])
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, queries, create_graph=True)


@pytest.mark.parametrize("transform", ["compile", "vmap", "autocast", "no_grad"])
def test_under_transforms(device, transform):
    features, ids = problem(device=device)

    def call(queries, own_key, memory):
        return cascade_mil_nce(queries, own_key, memory, [1, 0, 1], [45, 22, 5], **ids)

    expected = call(*features)
    if transform == "compile":
        found = torch.compile(call, fullgraph=True, backend="aot_eager")(*features)
    elif transform == "vmap":
        mapped = torch.vmap(call, in_dims=(0, None, None))(torch.stack([features[0], -features[0]]), *features[1:])
        found = [x[0] for x in mapped]
    elif transform == "autocast":
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found = call(*features)
    else:
        with torch.no_grad():
            found = call(*[x.requires_grad_() for x in features])
            assert not found[0].requires_grad
    assert_equal(found, expected)


def test_opcheck():
    (queries, own_key, memory), ids = problem(B=4, K=30, D=8)
    for modes, view in ((None, 0), (torch.tensor([0, 1, 2, 0]), 1)):
        arguments = (queries, own_key, memory, [1, 0], [9, 3], view, *ids.values(), modes, "ignore", "keep", 0.1)
        torch.library.opcheck(torch.ops.cpr_fast.cascade_mil_nce.default, arguments)


def test_the_scores_are_computed_once():
    """The operator is called where it can be: a fallback to two calls would give the same results."""
    features, _ = problem()
    with torch.profiler.profile() as profile:
        cascade_mil_nce(*features, [1, 0], [40, 5])
    called = {event.key for event in profile.key_averages()}
    assert "cpr_fast::cascade_mil_nce" in called and not called & {"cpr_fast::mil_nce", "cpr_fast::cascade_select"}


X, IDS = torch.rand(2, 4, 8), torch.zeros(9, dtype=torch.int64)
GOOD = {"queries": X, "own_key": X[0], "memory": torch.rand(2, 9, 8), "views": [1, 0], "keep": [5, 2]}


@pytest.mark.parametrize("alike", ["one operator", "two operators"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": X[0]}, ValueError, "queries: expected a non-empty shape [V, B, D], got [4, 8]"),
        ({"queries": X.double()}, TypeError, "queries: expected dtype float32, bfloat16, float16, got torch.float64"),
        ({"queries": X.tolist()}, TypeError, "queries: expected a torch.Tensor of shape [V, B, D], got list"),
        ({"own_key": X}, ValueError, "own_key: expected a non-empty shape [B, D], got [2, 4, 8]"),
        ({"own_key": X[0, :3]}, ValueError, "own_key: expected the shape of query, [4, 8], got [3, 8]"),
        ({"own_key": X[0].half()}, TypeError, "own_key: expected the dtype of query, torch.float32, got torch.float16"),
        ({"own_key": X[0].to("meta")}, ValueError, "own_key: expected the device of query, cpu, got meta"),
        ({"own_key": None}, TypeError, "own_key: expected a torch.Tensor of shape [B, D], got NoneType"),
        ({"memory": X[:1]}, ValueError, "memory: expected shape [V=2, K, D=8], got [1, 4, 8]"),
        ({"memory": None}, TypeError, "memory: expected a torch.Tensor of shape [V, K, D], got NoneType"),
        ({"views": [2, 0]}, ValueError, "views: expected values in 0..1, got [2, 0]"),
        ({"keep": [2, 5]}, ValueError, "keep: expected non-increasing values >= 1, got [2, 5]"),
        ({"view": 2}, ValueError, "view: expected an int in 0..1, got 2"),
        ({"view": -1}, ValueError, "view: expected an int in 0..1, got -1"),
        ({"view": 0.0}, TypeError, "view: expected an int, got 0.0 (float)"),
        ({"query_ids": IDS[:4]}, ValueError, "query_ids: requires memory_ids, got None"),
        ({"memory_ids": IDS[:8]}, ValueError, "memory_ids: expected shape [9], got [8]"),
        ({"self_positive": IDS[:3]}, ValueError, "self_positive: expected shape [4], got [3]"),
        ({"self_positive": IDS[:4] + 3}, ValueError, "self_positive: expected 0, 1 or 2, got 3"),
        ({"self_positive": "drop"}, ValueError, "self_positive: expected one of 'keep', 'denominator', 'drop_both', "),
        ({"same_id": "drop"}, ValueError, "same_id: expected one of 'positive', 'ignore', 'negative', got 'drop'"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive finite number, got 0.0"),
        ({"temperature": "1"}, TypeError, "temperature: expected a number, got '1' (str)"),
        ({"reduction": "sum"}, ValueError, "reduction: expected one of 'mean', 'none', got 'sum'"),
        ({"precision": "fp8"}, ValueError, "precision: expected one of 'fp32', 'bf16', got 'fp8'"),
    ],
)
def test_bad_arguments_are_named(change, error, message, alike):
    other = {} if alike == "one operator" or "precision" in change else {"precision": "bf16"}
    with pytest.raises(error, match="^" + re.escape(message)):
        cascade_mil_nce(**GOOD | other | change)


def test_a_query_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"^own_key: expected the shape of query, \[3, 8\], got \[4, 8\]"):
        cascade_mil_nce(**GOOD, query=X[0, :3])


def test_torch_func_is_refused_with_a_reason():
    with pytest.raises(NotImplementedError, match="mil_nce: torch.func.grad, .* not supported"):
        torch.func.grad(lambda queries: cascade_mil_nce(**GOOD | {"queries": queries})[0])(X)
