"""Compares cascade_select with a stable sort in float64, bit for bit if the scores are exact.

Lattice inputs (multiples of 1/4, |x| <= 2) have exact scores in any order of summation, and many of them are equal.
"""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpr_fast.ops import cascade_select, cascade_select_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def lattice(*shape, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 9, shape, generator=generator) / 4).to(device, dtype)


def schedule(K, n, V, top_k=5, ratio=0.5):
    views = [(n - 1 - s) % V for s in range(n)]
    return views, [max(top_k, int(K * ratio**s)) for s in range(1, n)] + [top_k]


def assert_same(result, expected):
    for ours, reference in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("V", "B", "K", "D", "n"),
    [(1, 1, 1, 1, 1), (2, 3, 17, 5, 2), (2, 33, 257, 128, 7), (3, 16, 1000, 33, 4), (2, 5, 4099, 16, 10)],
)
def test_equals_float64_on_lattice(device, dtype, V, B, K, D, n):
    queries = lattice(V, B, D, seed=1, dtype=dtype, device=device)
    memory = lattice(V, K, D, seed=2, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(3)
    query_ids = torch.randint(-1, 6, (B,), generator=generator).to(device)
    memory_ids = torch.randint(-1, 6, (K,), generator=generator).to(device)
    views, keep = schedule(K, n, V)
    for ids in ({}, {"memory_ids": memory_ids}, {"memory_ids": memory_ids, "query_ids": query_ids}):
        assert_same(
            cascade_select(queries, memory, views, keep, **ids), cascade_select_ref(queries, memory, views, keep, **ids)
        )


@pytest.mark.parametrize("K", [48, 49, 1500])
def test_scores_that_are_consecutive_floats(device, K):
    """Each query has its own order of the same K scores, which differ by one unit in the last place."""
    generator = torch.Generator().manual_seed(K)
    orders = torch.stack([torch.randperm(K, generator=generator) for _ in range(40)])  # [B, K]
    memory = (1 + orders.T * 2.0**-23)[None].to(device)  # [1, K, D]: dimension d holds the scores of query d
    queries = torch.eye(40, device=device)[None]
    for keep in (1, K // 7, K // 3, K // 2, K - 9):
        indices, scores = cascade_select(queries, memory, [0], [keep])
        assert torch.equal(indices.cpu(), orders.argsort(dim=1, descending=True)[:, :keep])
        assert torch.equal(scores.cpu(), (1 + torch.arange(K - 1, K - 1 - keep, -1) * 2.0**-23).expand(40, keep))


@pytest.mark.parametrize("n", range(1, 11))
@pytest.mark.parametrize("ratio", [0.5, 0.99])
def test_every_depth(device, n, ratio):
    queries, memory = lattice(2, 4, 8, seed=n, device=device), lattice(2, 300, 8, seed=n + 1, device=device)
    views, keep = schedule(300, n, 2, ratio=ratio)
    assert_same(cascade_select(queries, memory, views, keep), cascade_select_ref(queries, memory, views, keep))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_cascade(data):
    V, B, K, D = (data.draw(st.integers(1, high)) for high in (3, 5, 90, 9))
    n = data.draw(st.integers(1, 5))
    views = data.draw(st.lists(st.integers(0, V - 1), min_size=n, max_size=n))
    keep = sorted(data.draw(st.lists(st.integers(1, K + 20), min_size=n, max_size=n)), reverse=True)
    seed = data.draw(st.integers(0, 1000))
    queries, memory = lattice(V, B, D, seed=seed), lattice(V, K, D, seed=seed + 1)
    memory_ids = torch.randint(-1, 3, (K,), generator=torch.Generator().manual_seed(seed))
    query_ids = torch.randint(-1, 3, (B,), generator=torch.Generator().manual_seed(seed + 1))
    ids = {"memory_ids": memory_ids, "query_ids": query_ids}
    assert_same(
        cascade_select(queries, memory, views, keep, **ids), cascade_select_ref(queries, memory, views, keep, **ids)
    )


def test_random_features_agree_with_float64_wherever_no_gap_is_small(device):
    """Stage by stage: the kept set may differ from the float64 one only in scores within the rounding bound."""
    V, B, K, D = 2, 9, 3001, 128
    generator = torch.Generator().manual_seed(0)
    queries, memory = (
        torch.nn.functional.normalize(torch.randn(V, size, D, generator=generator), dim=2).to(device) for size in (B, K)
    )
    scores = queries.double() @ memory.double().transpose(1, 2)  # [V, B, K]
    bound = 2 * D * 2.0**-24
    views, keep = schedule(K, 7, V)
    alive = torch.ones(B, K, dtype=torch.bool, device=device)
    for s in range(len(views)):
        kept, _ = cascade_select(queries, memory, views[: s + 1], keep[: s + 1])
        assert (kept >= 0).all()
        now = torch.zeros_like(alive).scatter_(1, kept, True)
        assert (now.sum(1) == keep[s]).all(), "an entry is listed twice"
        assert (now & ~alive).sum() == 0, "an entry came back"
        worst_kept = scores[views[s]].masked_fill(~now, torch.inf).amin(1)
        best_dropped = scores[views[s]].masked_fill(now | ~alive, -torch.inf).amax(1)
        assert (best_dropped <= worst_kept + bound).all()
        alive = now
    ordered = scores[views[-1]].gather(1, kept)
    assert (ordered[:, 1:] <= ordered[:, :-1] + bound).all()


def fma_chain(query, key):
    """The score by its definition, in exact arithmetic rounded to float32 after every step."""
    acc = torch.zeros((), dtype=torch.float32)
    for q, k in zip(query.tolist(), key.tolist(), strict=True):
        exact = Fraction(q) * Fraction(k) + Fraction(acc.item())
        acc = nearest_float32(exact)
    return acc.item()


def nearest_float32(exact: Fraction) -> torch.Tensor:
    guess = torch.tensor(float(exact), dtype=torch.float32)
    around = [guess, guess.nextafter(torch.tensor(torch.inf)), guess.nextafter(torch.tensor(-torch.inf))]
    even = [int(x.view(torch.int32)) & 1 for x in around]
    return min(zip(around, even, strict=True), key=lambda pair: (abs(Fraction(pair[0].item()) - exact), pair[1]))[0]


@pytest.mark.parametrize("scale", [1.0, 1e-22])  # 1e-22: products below the smallest normal number
def test_scores_are_the_canonical_chain(device, scale, cpu_variants):
    generator = torch.Generator().manual_seed(5)
    queries, memory = (torch.randn(1, size, 37, generator=generator) * scale for size in (3, 21))
    expected = torch.tensor([[fma_chain(q, k) for k in memory[0]] for q in queries[0]])
    names, force = cpu_variants
    for name in names if device.type == "cpu" else [None]:
        if name is not None:
            force(name)
        indices, scores = cascade_select(queries.to(device), memory.to(device), [0], [21])
        assert torch.equal(scores.cpu(), expected.gather(1, indices.cpu())), name


def test_flush_to_zero_of_the_caller_is_not_inherited():
    queries, memory = torch.full((1, 1, 1), 1e-22), torch.tensor([[[1e-22], [2e-22]]])
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("no flush-to-zero mode on this machine")
        _, scores = cascade_select(queries, memory, [0], [2])
    finally:
        torch.set_flush_denormal(False)
    assert (scores > 0).all()


def test_ties_keep_the_lowest_slots(device):
    queries, memory = torch.ones(1, 2, 4, device=device), torch.ones(1, 5000, 4, device=device)
    indices, scores = cascade_select(queries, memory, [0, 0], [100, 7])
    assert indices.tolist() == [list(range(7))] * 2
    assert (scores == 4).all()


def test_negative_zero_equals_zero(device):
    memory = torch.tensor([[[-1e-30], [0.0], [1e-30], [-1.0]]], device=device)
    queries = torch.full((1, 1, 1), 1e-30, device=device)  # scores -0, 0, 0, -1e-30
    indices, scores = cascade_select(queries, memory, [0], [4])
    assert indices.tolist() == [[0, 1, 2, 3]]
    assert not scores[0, :3].signbit().any()


def test_nan_leaves_and_infinities_are_ordered(device):
    memory = torch.tensor([[[-torch.inf], [torch.nan], [3.0], [torch.inf], [-4.0]]], device=device)
    queries = torch.ones(1, 1, 1, device=device)
    indices, scores = cascade_select(queries, memory, [0], [5])
    assert indices.tolist() == [[3, 2, 4, 0, -1]]
    assert scores.tolist() == [[math.inf, 3.0, -4.0, -math.inf, -math.inf]]


def test_nan_in_a_later_view_uses_no_place_of_an_earlier_stage(device):
    memory = torch.tensor([[[9.0], [8.0], [7.0]], [[torch.nan], [1.0], [2.0]]], device=device)
    queries = torch.ones(2, 1, 1, device=device)
    assert cascade_select(queries, memory, [0, 1], [2, 2])[0].tolist() == [[2, 1]]
    assert cascade_select(queries, memory, [0, 0], [2, 2])[0].tolist() == [[0, 1]]  # view 1 is not compared


def test_padding(device):
    queries, memory = lattice(2, 3, 8, device=device), lattice(2, 20, 8, seed=1, device=device)
    empty = torch.full((20,), -1, device=device)
    indices, scores = cascade_select(queries, memory, [0, 1], [50, 30], memory_ids=empty)
    assert indices.shape == (3, 30) and (indices == -1).all() and (scores == -torch.inf).all()
    own = torch.zeros(20, dtype=torch.int64, device=device)
    indices, _ = cascade_select(queries, memory, [0], [4], memory_ids=own, query_ids=own[:3])
    assert (indices == -1).all()
    indices, _ = cascade_select(queries, memory, [0], [30])
    assert (indices[:, :20].sort(1).values == torch.arange(20, device=device)).all() and (indices[:, 20:] == -1).all()


def adversarial_rows():
    """Rows whose threshold may lie outside a sampled bracket: few values, one outlier, sorted, blocks, huge range."""
    K = 6000
    ramp = torch.arange(K, dtype=torch.float32)
    yield "ascending", ramp
    yield "descending", -ramp
    yield "two values", (ramp % 2)
    yield "one outlier", (ramp == 4711).float()
    yield "periodic", (ramp % 94)  # 94 = K / 64, so that all samples are one value
    yield "blocks", (ramp // 1000)
    yield "powers", torch.pow(2.0, ramp % 250 - 125) * (1 - 2 * (ramp % 2))


@pytest.mark.parametrize("name, row", [pytest.param(name, row, id=name) for name, row in adversarial_rows()])
def test_rows_that_mislead_the_sampling(device, name, row):
    memory, queries = row.to(device)[None, :, None], torch.ones(1, 1, 1, device=device)
    for keep in ([1], [37], [5990], [3000, 1500, 750, 5], [5999, 5998, 5]):
        views = [0] * len(keep)
        assert_same(cascade_select(queries, memory, views, keep), cascade_select_ref(queries, memory, views, keep))


def test_variants_agree_bit_for_bit(cpu_variants):
    generator = torch.Generator().manual_seed(1)
    queries, memory = (torch.randn(2, size, 50, generator=generator) for size in (37, 1111))
    views, keep = schedule(1111, 5, 2)
    names, force = cpu_variants
    results = []
    for name in names:
        force(name)
        results.append(cascade_select(queries, memory, views, keep))
    for result in results[1:]:
        assert_same(result, results[0])


def test_threads_batch_and_repetition_change_nothing(thread_counts):
    generator = torch.Generator().manual_seed(2)
    queries, memory = (torch.randn(2, size, 64, generator=generator) for size in (40, 1500))
    views, keep = schedule(1500, 7, 2)
    whole = cascade_select(queries, memory, views, keep)
    for threads in thread_counts:
        torch.set_num_threads(threads)
        for _ in range(34):  # a hundred in total
            assert_same(cascade_select(queries, memory, views, keep), whole)
    for b in (0, 17, 39):
        alone = cascade_select(queries[:, b : b + 1], memory, views, keep)
        assert_same(alone, [x[b : b + 1] for x in whole])


def test_scratch_kept_from_other_calls_changes_nothing(kernel_library):
    """Sizes grow and shrink, so that memory blocks are kept, reused, too small, replaced and freed."""
    expected = {}
    for K in (9_000, 700, 70_000, 9_001, 700, 9_000, 70_000):
        memory, (views, keep) = lattice(2, K, 8, seed=K), schedule(K, 3, 2)
        result = cascade_select(lattice(2, 33, 8, seed=1), memory, views, keep)
        assert_same(result, expected.setdefault(K, result))
        if K == 9_001:
            kernel_library.cpr_release_scratch()
    assert_same(
        expected[700], cascade_select_ref(lattice(2, 33, 8, seed=1), lattice(2, 700, 8, seed=700), *schedule(700, 3, 2))
    )


def test_permuting_the_memory_permutes_the_result(device):
    generator = torch.Generator().manual_seed(3)
    queries, memory = (torch.randn(2, size, 32, generator=generator).to(device) for size in (6, 900))
    order = torch.randperm(900, generator=generator).to(device)
    views, keep = schedule(900, 5, 2)
    indices, scores = cascade_select(queries, memory, views, keep)
    permuted, permuted_scores = cascade_select(queries, memory[:, order], views, keep)
    assert_same((order[permuted], permuted_scores), (indices, scores))


def test_strides_do_not_matter(device):
    queries, memory = lattice(2, 7, 20, device=device), lattice(2, 100, 20, seed=1, device=device)
    strided = (queries.transpose(0, 2).contiguous().transpose(0, 2), memory.repeat(1, 1, 2)[:, :, ::2].contiguous())
    strided = (strided[0], torch.stack([memory, memory], 3)[..., 0])
    assert not strided[0].is_contiguous() and not strided[1].is_contiguous()
    assert_same(cascade_select(*strided, [0, 1], [50, 5]), cascade_select(queries, memory, [0, 1], [50, 5]))


def test_bf16_precision_finds_what_is_clearly_best(device):
    memory = torch.eye(64, device=device)[None].repeat(2, 1, 1)
    indices, _ = cascade_select(memory[:, :9], memory, [1, 0], [32, 1], precision="bf16")
    assert indices.flatten().tolist() == list(range(9))


def test_not_differentiable(device):
    queries = lattice(2, 3, 8, device=device).requires_grad_()
    _, scores = cascade_select(queries, lattice(2, 20, 8, device=device), [0], [2])
    assert not scores.requires_grad


def test_opcheck(device):
    ids = torch.arange(20, device=device)
    for dtype in DTYPES:
        queries, memory = lattice(2, 3, 8, dtype=dtype, device=device), lattice(2, 20, 8, dtype=dtype, device=device)
        arguments = (queries, memory, [0, 1], [10, 5], ids[:3], ids, "fp32")
        torch.library.opcheck(torch.ops.cpr_fast.cascade_select.default, arguments)


def test_compiles_into_one_graph(device):
    queries, memory = lattice(2, 3, 8, device=device), lattice(2, 50, 8, seed=1, device=device)
    ids = torch.arange(50, device=device)

    def mine(queries, memory):
        return cascade_select(queries * 2, memory, [0, 1], [20, 5], query_ids=ids[:3], memory_ids=ids)

    assert_same(torch.compile(mine, fullgraph=True, backend="aot_eager")(queries, memory), mine(queries, memory))


GOOD = {"queries": lattice(2, 3, 4), "memory": lattice(2, 9, 4), "views": [0, 1], "keep": [5, 2]}
IDS = torch.zeros(9, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": lattice(3, 4)}, ValueError, r"queries: .*\[V, B, D\].*\[3, 4\]"),
        ({"queries": lattice(2, 0, 4)}, ValueError, "queries: .*non-empty"),
        ({"memory": lattice(2, 9, 5)}, ValueError, r"memory: .*D=4.*\[2, 9, 5\]"),
        ({"memory": lattice(1, 9, 4)}, ValueError, "memory: .*V=2"),
        ({"memory": lattice(2, 9, 4).bfloat16()}, TypeError, "memory: .*float32.*bfloat16"),
        ({"queries": lattice(2, 3, 4).double()}, TypeError, "queries: .*float64"),
        ({"memory": lattice(2, 9, 4).to("meta")}, ValueError, "memory: .*device"),
        ({"views": [0]}, ValueError, "views, keep"),
        ({"views": [], "keep": []}, ValueError, "views, keep"),
        ({"views": [0, 2]}, ValueError, r"views: .*0\.\.1"),
        ({"views": [0, -1]}, ValueError, "views"),
        ({"keep": [2, 5]}, ValueError, "keep: .*non-increasing"),
        ({"keep": [2, 0]}, ValueError, "keep"),
        ({"query_ids": IDS[:3]}, ValueError, "query_ids: requires memory_ids"),
        ({"memory_ids": IDS[:8]}, ValueError, r"memory_ids: expected shape \[9\]"),
        ({"memory_ids": IDS.int()}, TypeError, "memory_ids: expected int64"),
        ({"memory_ids": IDS, "query_ids": IDS}, ValueError, r"query_ids: expected shape \[3\]"),
        ({"precision": "tf32"}, ValueError, "precision: .*tf32"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        cascade_select(**{**GOOD, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"memory": lattice(2, 9, 5)},
        {"views": [0, 7]},
        {"keep": [1, 2]},
        {"memory_ids": IDS[:4]},
        {"memory_ids": IDS.int()},
        {"precision": "x"},
    ],
)
def test_the_raw_operator_checks_too(change):
    arguments = {**GOOD, "query_ids": None, "memory_ids": None, "precision": "fp32", **change}
    with pytest.raises(ValueError):
        torch.ops.cpr_fast.cascade_select(**arguments)
