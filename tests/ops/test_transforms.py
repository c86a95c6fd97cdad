"""The operators under torch.vmap, and the errors for unsupported torch.func transforms and second derivatives."""

import pytest
import torch
from torch.nn.functional import normalize

from cpr_fast.ops import cascade_select, mil_nce, mil_nce_ref, tvl1_flow

N, V, B, K, D = 3, 2, 4, 30, 8


def features(*shape, seed=0):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def whole_numbers(high, *shape, seed=0):
    return torch.randint(-1, high, shape, generator=torch.Generator().manual_seed(seed))


def assert_maps(function, arguments, in_dims):
    """torch.vmap gives what a loop over the slices gives."""
    mapped = torch.vmap(function, in_dims=in_dims)(*arguments)
    slices = [
        function(*(a if d is None else a.select(d, n) for a, d in zip(arguments, in_dims, strict=True)))
        for n in range(N)
    ]
    if isinstance(mapped, tuple):
        slices = zip(*slices, strict=True)
        for found, expected in zip(mapped, slices, strict=True):
            assert torch.equal(found, torch.stack(expected))
    else:
        assert torch.equal(mapped, torch.stack(slices))


@pytest.mark.parametrize("in_dims", [(0, None, None, None), (2, None, 1, None), (0, 1, 0, 0), (None, 0, None, None),
                                     (None, None, None, 0)])  # fmt: skip
def test_vmap_of_cascade_select(in_dims):
    def mine(queries, memory, query_ids, memory_ids):
        return cascade_select(queries, memory, [1, 0], [12, 5], query_ids=query_ids, memory_ids=memory_ids)

    shapes, made = ((V, B, D), (V, K, D), (B,), (K,)), []
    for seed, (shape, mapped) in enumerate(zip(shapes, in_dims, strict=True)):
        size = list(shape)
        if mapped is not None:
            size.insert(mapped, N)
        made.append(whole_numbers(6, *size, seed=seed) if len(shape) == 1 else features(*size, seed=seed))
    assert_maps(mine, made, in_dims)


@pytest.mark.parametrize("in_dims", [(0, 0, None, 0), (1, 0, None, None), (None, 1, None, None), (0, None, 0, 1)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_of_mil_nce(in_dims, reduction):
    def loss(query, own_key, memory, positives):
        return mil_nce(query, own_key, memory, positives, reduction=reduction)

    shapes, made = ((B, D), (B, D), (K, D), (B, 2)), []
    for seed, (shape, mapped) in enumerate(zip(shapes, in_dims, strict=True)):
        size = list(shape)
        if mapped is not None:
            size.insert(mapped, N)
        made.append(whole_numbers(K, *size, seed=seed) if seed == 3 else features(*size, seed=seed))
    assert_maps(loss, made, in_dims)


def test_gradient_through_vmap():
    memory, results = features(K, D, seed=5), []
    for function in (mil_nce, mil_nce_ref):
        query = features(N, B, D).requires_grad_()
        torch.vmap(lambda q: function(q, q.detach(), memory))(query).sum().backward()  # noqa: B023
        results.append(query.grad)
    torch.testing.assert_close(*results)


def test_vmap_of_tvl1_flow():
    clips = torch.rand(4, N, 3, 20, 24, generator=torch.Generator().manual_seed(0))

    def flow(clip):
        return tvl1_flow(clip, scales=1, warps=1)

    assert_maps(flow, (clips[0],), (0,))
    torch.testing.assert_close(torch.vmap(flow, in_dims=1)(clips[:, :, :2]), flow(clips[:, :, :2]).movedim(1, 0))


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "jvp", "grad of vmap"])
def test_torch_func_is_refused_with_a_reason(transform):
    query, memory = features(B, D), features(K, D, seed=1)

    def loss(q):
        return mil_nce(q, memory[:B], memory)

    calls = {
        "grad": lambda: torch.func.grad(loss)(query),
        "vjp": lambda: torch.func.vjp(loss, query)[1](torch.tensor(1.0)),
        "jacrev": lambda: torch.func.jacrev(loss)(query),
        "jvp": lambda: torch.func.jvp(loss, (query,), (query,)),
        "grad of vmap": lambda: torch.func.grad(lambda q: torch.vmap(loss)(q).sum())(query.expand(N, B, D)),
    }
    with pytest.raises(NotImplementedError, match="mil_nce: torch.func.grad, .* not supported"):
        calls[transform]()


def test_forward_mode_is_refused_with_a_reason():
    query, memory = features(B, D), features(K, D, seed=1)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(NotImplementedError, match="mil_nce: has no forward-mode derivative"):
            mil_nce(dual, memory[:B], memory)


def test_differentiating_twice_is_refused_with_the_temperature_too():
    query, memory = features(B, D), features(K, D, seed=1)
    temperature = torch.tensor(0.1, requires_grad=True)
    loss = mil_nce(query, memory[:B], memory, temperature=temperature)
    with pytest.raises(RuntimeError, match="mil_nce: cannot be differentiated twice"):
        torch.autograd.grad(loss, temperature, create_graph=True)
