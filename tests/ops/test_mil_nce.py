"""Compares mil_nce with float64 autograd through mil_nce_ref."""

import itertools

import pytest
import torch
from torch.nn.functional import normalize

from cpr_fast.ops import mil_nce, mil_nce_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(B, K, D, P=3, *, seed=0, dtype=torch.float32, device="cpu", ids=True):
    """(query, own_key, memory), positives with duplicates and -1, and keyword arguments with ids."""
    generator = torch.Generator().manual_seed(seed)
    features = [normalize(torch.randn(size, D, generator=generator, dtype=torch.float64), dim=1) for size in (B, B, K)]
    positives = torch.randint(-1, K, (B, P), generator=generator)
    positives[:, -1] = positives[:, 0]
    settings = {}
    if ids:
        settings["query_ids"] = torch.randint(-1, 5, (B,), generator=generator).to(device)
        settings["memory_ids"] = torch.randint(-1, 5, (K,), generator=generator).to(device)
    return [x.to(device, dtype) for x in features], positives.to(device), settings


def gradients(function, features, positives, settings, *, weights=None):
    """Returns the loss per row, and the gradients to query, own_key and memory."""
    leaves = [x.detach().clone().requires_grad_() for x in features]
    loss = function(*leaves, positives, reduction="none", **settings)
    (loss * (1 if weights is None else weights)).sum().backward()
    return [loss.detach()] + [x.grad for x in leaves]


def in_other_orders(features, positives, settings, weights, orders=4):
    """Yields `gradients` of plain torch for `orders` different orders of the dimensions and of the memory."""
    (query, own_key, memory), generator = features, torch.Generator().manual_seed(0)
    for order in range(orders):
        D, K = (torch.randperm(size, generator=generator) if order else torch.arange(size) for size in memory.T.shape)
        D, K = D.to(memory.device), K.to(memory.device)
        dimension, slot = D.argsort(), K.argsort()  # the new place of each
        moved = None if positives is None else torch.where(positives < 0, -1, slot[positives.clamp(min=0)])
        ids = {"memory_ids": settings["memory_ids"][K]} if "memory_ids" in settings else {}
        reordered = (query[:, D], own_key[:, D], memory[K][:, D])
        loss, *grads = gradients(mil_nce_ref, reordered, moved, settings | ids, weights=weights)
        yield loss, grads[0][:, dimension], grads[1][:, dimension], grads[2][slot][:, dimension]


def assert_as_exact_as_torch(features, positives, settings):
    """Asserts that the error against float64 is at most twice that of plain torch in this dtype, plus one rounding.

    The order of additions on a processor makes the error of plain torch two to five times larger or smaller, so the
    largest error of four orders is used.
    """
    weights = torch.linspace(-1, 2, features[0].shape[0], device=features[0].device)
    ours = gradients(mil_nce, features, positives, settings, weights=weights)
    exact = gradients(mil_nce_ref, [x.double() for x in features], positives, settings, weights=weights.double())
    same_dtype = list(in_other_orders(features, positives, settings, weights))
    for i, name in enumerate(("loss", "query", "own_key", "memory")):
        x, truth = ours[i], exact[i]
        plain = max((y[i].double() - truth).abs().max() for y in same_dtype)
        bound = 2 * plain + 4 * torch.finfo(x.dtype).eps * (1 + truth.abs().max())
        assert (x.double() - truth).abs().max() <= bound, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "K", "D"), [(1, 1, 1), (3, 65, 7), (33, 300, 128), (17, 2500, 40)])
def test_loss_and_gradients(device, dtype, B, K, D):
    for ids, P in itertools.product((True, False), (0, 1, 5)):
        features, positives, settings = problem(B, K, D, max(P, 1), dtype=dtype, device=device, ids=ids)
        assert_as_exact_as_torch(features, positives if P else None, settings)


@pytest.mark.parametrize("same_id", ["positive", "ignore", "negative"])
@pytest.mark.parametrize("self_positive", ["keep", "denominator", "drop_both", "rows"])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_every_meaning_of_ids_and_own_key(device, same_id, self_positive, temperature):
    for with_positives in (True, False):
        features, positives, settings = problem(19, 130, 24, device=device, seed=4)
        modes = torch.arange(19, device=device) % 3
        settings |= {"same_id": same_id, "self_positive": modes if self_positive == "rows" else self_positive}
        settings["temperature"] = temperature
        assert_as_exact_as_torch(features, positives if with_positives else None, settings)


def test_an_explicit_positive_overrides_same_id_and_counts_once():
    features, _, _ = problem(2, 6, 8, dtype=torch.float64)
    settings = {"query_ids": torch.tensor([1, 2]), "memory_ids": torch.tensor([1, 2, 1, -1, 0, 0]), "temperature": 0.5}
    positives = torch.tensor([[0, 0, 3], [4, -1, 4]])  # slot 3 is empty
    query, own_key, memory = features
    scores = torch.cat([(query * own_key).sum(1, keepdim=True), query @ memory.T], 1) / 0.5

    def expected(present, positive):
        rows = [
            scores[b, a].logsumexp(0) - scores[b, p].logsumexp(0)
            for b, (a, p) in enumerate(zip(present, positive, strict=True))
        ]
        return torch.stack(rows)

    everything = [[0, 1, 2, 3, 5, 6]] * 2  # column 0 is own_key, column 1 + slot the memory; slot 3 is empty
    cases = {
        "negative": (everything, [[0, 1], [0, 5]]),
        "positive": (everything, [[0, 1, 3], [0, 2, 5]]),
        "ignore": ([[0, 1, 2, 5, 6], [0, 1, 3, 5, 6]], [[0, 1], [0, 5]]),
    }
    for same_id, (present, positive) in cases.items():
        loss = mil_nce(*features, positives, same_id=same_id, reduction="none", **settings)
        torch.testing.assert_close(loss, expected(present, positive))


def test_own_key_is_dropped_only_where_another_positive_remains():
    features, _, _ = problem(3, 5, 8, dtype=torch.float64, ids=False)
    positives = torch.tensor([[-1], [2], [0]])
    memory_ids = torch.tensor([-1, 7, 7, 7, 7])  # row 2's only positive is empty
    kept = mil_nce(*features, positives, memory_ids=memory_ids, reduction="none")
    for mode in ("denominator", "drop_both"):
        dropped = mil_nce(*features, positives, memory_ids=memory_ids, self_positive=mode, reduction="none")
        assert torch.equal(dropped[[0, 2]], kept[[0, 2]]) and not torch.equal(dropped[1], kept[1])


def test_an_empty_memory_gives_zero_whatever_it_holds(device):
    (query, own_key, memory), positives, _ = problem(5, 70, 16, device=device, ids=False)
    memory.fill_(torch.nan)
    empty = torch.full((70,), -1, device=device)
    results = gradients(mil_nce, (query, own_key, memory), positives, {"memory_ids": empty})
    assert all((x == 0).all() for x in results)


def test_empty_slots_may_hold_anything(device):
    (query, own_key, memory), positives, settings = problem(5, 200, 16, device=device)
    poisoned = memory.clone()
    poisoned[settings["memory_ids"] == -1] = torch.nan
    clean = gradients(mil_nce, (query, own_key, memory), positives, settings)
    dirty = gradients(mil_nce, (query, own_key, poisoned), positives, settings)
    assert all(torch.equal(x, y) for x, y in zip(clean, dirty, strict=True))


def test_nan_features_are_not_hidden(device):
    for position in range(3):
        features, positives, _ = problem(4, 200, 16, device=device, ids=False)
        features[position][0, 3] = torch.nan
        assert mil_nce(*features, positives).isnan()


def test_large_scores_do_not_overflow(device):
    for dtype in DTYPES:
        features, positives, settings = problem(4, 100, 64, dtype=dtype, device=device)
        features = [30 * x for x in features]
        results = gradients(mil_nce, features, positives, settings | {"temperature": 0.01})
        assert all(x.isfinite().all() for x in results)


def test_mean_divides_by_the_batch(device):
    features, positives, settings = problem(7, 50, 16, device=device)
    rows = mil_nce(*features, positives, reduction="none", **settings)
    torch.testing.assert_close(mil_nce(*features, positives, **settings), rows.sum() / 7)


def test_gradcheck():
    features, positives, settings = problem(5, 70, 6, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in features]
    for same_id, mode in itertools.product(("positive", "ignore"), ("keep", "denominator", "drop_both")):
        options = settings | {"same_id": same_id, "self_positive": mode, "temperature": 0.3, "reduction": "none"}
        assert torch.autograd.gradcheck(lambda *x: mil_nce(*x, positives, **options), leaves)  # noqa: B023


def test_in_batch_keys_share_their_gradient(device):
    """The memory may be the keys of the batch, with a gradient: own_key and memory are then the same tensor."""
    (query, keys, _), _, _ = problem(9, 1, 32, device=device, ids=False)
    results = []
    for function, q, k in ((mil_nce, query, keys), (mil_nce_ref, query.double(), keys.double())):
        q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
        function(q, k, k, memory_ids=torch.arange(9, device=device), same_id="ignore").backward()
        results.append((q.grad.double(), k.grad.double()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_the_memory_may_be_overwritten_unless_it_learns(device):
    for learns in (False, True):
        (query, own_key, memory), positives, _ = problem(4, 60, 16, device=device, ids=False)
        query.requires_grad_()
        expected = torch.autograd.grad(mil_nce(query, own_key, memory, positives), query)[0]
        memory = memory.clone().requires_grad_(learns)
        loss = mil_nce(query, own_key, memory, positives)
        with torch.no_grad():
            memory.zero_()
        if learns:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()
            assert torch.equal(query.grad, expected)


@pytest.mark.parametrize("learning", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_a_gradient_does_not_depend_on_what_else_learns(device, learning):
    features, positives, settings = problem(5, 70, 16, device=device)
    expected = gradients(mil_nce, features, positives, settings)[1:]
    leaves = [x.clone().requires_grad_(i in learning) for i, x in enumerate(features)]
    mil_nce(*leaves, positives, reduction="none", **settings).sum().backward()
    for i, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, expected[i]) if i in learning else leaf.grad is None


def test_all_features_may_be_overwritten_if_only_the_query_learns(device):
    features, positives, settings = problem(5, 70, 16, device=device)
    features[0].requires_grad_()
    expected = torch.autograd.grad(mil_nce(*features, positives, **settings), features[0])[0]
    loss = mil_nce(*features, positives, **settings)
    with torch.no_grad():
        for x in features:
            x.zero_()
    assert torch.equal(torch.autograd.grad(loss, features[0])[0], expected)


def test_double_backward_raises(device):
    (query, own_key, memory), positives, _ = problem(4, 60, 16, device=device, ids=False)
    query.requires_grad_()
    loss = mil_nce(query, own_key, memory, positives)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, query, create_graph=True)


def test_variants_agree_bit_for_bit(cpu_variants):
    features, positives, settings = problem(37, 1500, 50, dtype=torch.float32)
    names, force = cpu_variants
    results = []
    for name in names:
        force(name)
        results.append(gradients(mil_nce, features, positives, settings))
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


def test_threads_batch_and_repetition_change_nothing(thread_counts):
    features, positives, settings = problem(40, 3000, 32)
    whole = gradients(mil_nce, features, positives, settings)
    for threads in thread_counts:
        torch.set_num_threads(threads)
        for _ in range(34):  # a hundred in total
            again = gradients(mil_nce, features, positives, settings)
            assert all(torch.equal(x, y) for x, y in zip(again, whole, strict=True))
    query, own_key, memory = features
    for b in (0, 21, 39):
        row = slice(b, b + 1)
        settings_b = settings | {"query_ids": settings["query_ids"][row]}
        alone = gradients(mil_nce, (query[row], own_key[row], memory), positives[row], settings_b)
        assert all(torch.equal(x, y[row]) for x, y in zip(alone[:3], whole[:3], strict=True))


def test_strides_do_not_matter(device):
    features, positives, settings = problem(6, 80, 16, device=device)
    strided = [torch.stack([x, x], 2)[..., 0] for x in features]
    assert not any(x.is_contiguous() for x in strided)
    expected = gradients(mil_nce, features, positives, settings)
    result = gradients(mil_nce, strided, positives, settings)
    assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))


def test_extra_memory_does_not_grow_with_the_queue():
    """Of the outputs, which have B and B x D values, the gradient to the query is saved for the backward pass."""
    sizes = []
    for K in (20_000, 40_000):
        features, positives, _ = problem(8, K, 16, ids=False)
        features[0].requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):  # noqa: B023
            mil_nce(*features, positives)
        sizes.append(sum(saved))
    assert sizes[0] == sizes[1]


def test_autocast_computes_in_float32(device):
    features, positives, settings = problem(6, 80, 16, device=device, dtype=torch.bfloat16)
    expected = mil_nce(*[x.float() for x in features], positives, **settings)
    leaf = features[0].clone().requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = mil_nce(leaf, features[1].float(), features[2], positives, **settings)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.equal(loss, expected) and leaf.grad.dtype == torch.bfloat16


def test_opcheck(device):
    for requires_grad in (False, True):
        (query, own_key, memory), positives, ids = problem(4, 30, 8, device=device)
        leaves = (query.requires_grad_(), own_key.requires_grad_(), memory.requires_grad_(requires_grad))
        arguments = (*leaves, positives, ids["query_ids"], ids["memory_ids"], None, "ignore", "keep", 0.1)
        torch.library.opcheck(torch.ops.cpr_fast.mil_nce.default, arguments)
    rows = [torch.rand(4, device=device) for _ in range(3)]
    torch.library.opcheck(
        torch.ops.cpr_fast.mil_nce_grad_memory.default, (*(x.detach() for x in arguments[:3]), *arguments[3:], *rows)
    )


def test_compiles_into_one_graph(device):
    features, positives, settings = problem(4, 60, 16, device=device)

    def loss(query, own_key, memory):
        return mil_nce(normalize(query, dim=1), own_key, memory, positives, **settings)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        leaves = [x.clone().requires_grad_() for x in features]
        value = function(*leaves)
        value.backward()
        results.append([value.detach()] + [x.grad for x in leaves])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("mode", [-1, 3])
def test_a_mode_of_the_own_key_that_does_not_exist_raises(mode):
    modes = torch.tensor([0, 2, mode, 1])
    with pytest.raises(ValueError, match=f"self_positive: expected 0, 1 or 2, got {mode}"):
        mil_nce(**{**GOOD, "self_positive": modes})


@pytest.mark.parametrize("slot", [60, -2, 2**40])
def test_a_slot_outside_the_memory_raises(slot):
    features, positives, _ = problem(4, 60, 16, ids=False)
    positives[2, 1] = slot
    with pytest.raises(IndexError, match=f"positives: .*0..59.*{slot}"):
        mil_nce(*features, positives)


X, IDS = torch.randn(4, 8), torch.zeros(9, dtype=torch.int64)
GOOD = {"query": X, "own_key": X, "memory": torch.randn(9, 8), "positives": IDS[:4, None]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": X[0]}, ValueError, r"query: .*\[B, D\].*\[8\]"),
        ({"query": X[:0]}, ValueError, "query: .*non-empty"),
        ({"query": X.long()}, TypeError, "query: .*int64"),
        ({"own_key": X[:3]}, ValueError, r"own_key: .*\[4, 8\].*\[3, 8\]"),
        ({"own_key": X.bfloat16()}, TypeError, "own_key: .*float32.*bfloat16"),
        ({"memory": torch.randn(9, 7)}, ValueError, r"memory: .*D=8.*\[9, 7\]"),
        ({"memory": torch.randn(9, 8).half()}, TypeError, "memory: .*float16"),
        ({"memory": torch.randn(9, 8, device="meta")}, ValueError, "memory: .*device"),
        ({"positives": IDS[:4]}, ValueError, r"positives: expected shape \[B=4, P\], got \[4\]"),
        ({"positives": IDS[:3, None]}, ValueError, r"positives: expected shape \[4, 1\], got \[3, 1\]"),
        ({"positives": IDS[:4, None].int()}, TypeError, "positives: expected int64"),
        ({"query_ids": IDS[:4]}, ValueError, "query_ids: requires memory_ids"),
        ({"memory_ids": IDS[:8]}, ValueError, r"memory_ids: expected shape \[9\]"),
        ({"memory_ids": IDS, "query_ids": IDS[:4].float()}, TypeError, "query_ids: expected int64"),
        ({"same_id": "drop"}, ValueError, "same_id: .*'drop'"),
        ({"self_positive": "drop"}, ValueError, "self_positive: .*'drop'"),
        ({"self_positive": IDS[:3]}, ValueError, r"self_positive: expected shape \[4\]"),
        ({"temperature": 0.0}, ValueError, "temperature: .*0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature: .*nan"),
        ({"reduction": "sum"}, ValueError, "reduction: .*'sum'"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        mil_nce(**{**GOOD, **change})
