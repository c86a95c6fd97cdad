"""The CUDA kernels of cascade_select, executed on the host from their unmodified source (tests/support/cuda_emulation).

Threads are emulated by fibers. The tests find wrong indexing, missing or divergent barriers and reads of unwritten
memory, but not what only hardware shows (memory ordering between warps, speed). tests/ops/test_cascade_select.py runs
the same checks on a GPU if there is one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.operator_references import ROUTES, integers, lattice, normal, select_by_sorting, unit


@pytest.fixture(params=ROUTES)
def every_route(request, emulated):
    """Makes the same call through every route; the streamed route must have used tensor cores."""
    emulated.resize(**ROUTES[request.param])
    before = emulated.products()
    yield request.param
    assert (emulated.products() > before) == (request.param == "streamed")
    emulated.resize()


def assert_selects(emulated, queries, memory, views, keep, **ids):
    indices, scores = emulated.cascade_select(queries, memory, views, keep, **ids)
    expected_indices, expected_scores = select_by_sorting(queries, memory, views, keep, **ids)
    np.testing.assert_array_equal(indices.numpy(), expected_indices)
    np.testing.assert_array_equal(scores.numpy(), expected_scores)


@pytest.mark.usefixtures("every_order", "every_route")
@pytest.mark.parametrize("inputs", [normal, lattice])
def test_cascade_matches_sorting_in_every_thread_order(emulated, inputs):
    queries, memory = inputs(2, 3, 24, seed=1), inputs(2, 700, 24, seed=2)
    assert_selects(emulated, queries, memory, [1, 0, 1], [350, 175, 5])


@pytest.mark.usefixtures("every_route")
@pytest.mark.parametrize("stages", range(1, 8))
def test_every_number_of_stages(emulated, stages):
    queries, memory = normal(2, 2, 7, seed=stages), normal(2, 300, 7, seed=100 + stages)
    views = [1 if (stages - 1 - s) % 2 == 0 else 0 for s in range(stages)]
    keep = [max(5, int(300 * 0.5 ** (s + 1))) for s in range(stages - 1)] + [5]
    assert_selects(emulated, queries, memory, views, keep)


@pytest.mark.usefixtures("every_route")
@pytest.mark.parametrize(
    ("B", "K", "D", "keep"),
    [
        (1, 1, 1, [1]),
        (1, 1, 3, [4, 3]),  # more requested than there are entries
        (5, 63, 33, [40, 9]),
        (33, 65, 16, [65, 64]),  # more queries than fit into a small tile, and everything is kept
        (2, 513, 5, [513, 513]),  # more survivors than can be ranked in shared memory
        (65, 130, 130, [50, 1]),
        (3, 1100, 4, [2000, 1100]),
    ],
)
def test_ugly_sizes(emulated, B, K, D, keep):
    queries, memory = normal(2, B, D, seed=3), normal(2, K, D, seed=4)
    assert_selects(emulated, queries, memory, [0, 1][: len(keep)], keep)


@pytest.mark.parametrize("route", ROUTES)
def test_three_views_are_never_streamed(emulated, route):
    emulated.resize(**ROUTES[route])
    before = emulated.products()
    assert_selects(emulated, normal(3, 3, 5, seed=27), normal(3, 300, 5, seed=28), [2, 0, 1], [150, 70, 9])
    assert emulated.products() == before
    emulated.resize()


def test_on_chip_all_stages_take_two_launches(emulated):
    # More entries than threads can mark with one word each, but few enough for shared memory.
    queries, memory = lattice(1, 2, 3, seed=25), normal(1, 17_000, 3, seed=26)
    before = emulated.launches()
    assert_selects(emulated, queries, memory, [0] * 4, [9000, 4000, 700, 600])
    assert emulated.launches() == before + 2


@pytest.mark.usefixtures("every_order")
@pytest.mark.parametrize("keep", [[4000, 600, 40], [3000, 513, 512, 33, 32, 5], [4090, 4089, 1500, 9], [4097, 20, 8]])
def test_survivors_are_handed_from_thread_to_thread(emulated, keep):
    """Marks of a quarter of the entries, at most 4,096, become eight for each thread, then one, then ranks."""
    queries, memory = lattice(2, 1, 3, seed=29), normal(2, 16_389, 3, seed=30)  # the last vector has one entry
    memory[:, 40:9000:7] = memory[:, 41:9001:7]  # ties
    assert_selects(emulated, queries, memory, [1, 0, 1, 1, 0, 1][: len(keep)], keep)


@pytest.mark.parametrize("processors", [132, 6, 3])  # tiles of 32, 64 and 128 keys
def test_scores_of_few_queries_in_every_tile(emulated, processors):
    emulated.resize(processors=processors)
    queries, memory = normal(1, 3, 33, seed=31), normal(1, 330, 33, seed=32)
    assert_selects(emulated, queries, memory, [0], [100])
    queries, memory = normal(1, 32, 64, seed=33), normal(1, 330, 64, seed=34)  # copied asynchronously
    assert_selects(emulated, queries, memory, [0], [100], memory_ids=integers(-1, 3, 330, seed=35))
    emulated.resize()


@pytest.mark.parametrize("route", ["in cache", "streamed"])
def test_many_queries_take_several_chunks(emulated, route):
    # The cache holds the rows of 33 queries; or none, then chunks have the 64 queries of a tile.
    emulated.resize(shared_limit=0, cache_size=900_000 if route == "in cache" else 0)
    queries, memory = lattice(2, 130, 4, seed=5), lattice(2, 2_000, 4, seed=6)
    assert_selects(emulated, queries, memory, [1, 0], [600, 3])
    emulated.resize()


@pytest.mark.usefixtures("every_route")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_input_types_are_widened_exactly(emulated, dtype):
    queries, memory = normal(2, 4, 36, seed=7, dtype=dtype), normal(2, 200, 36, seed=8, dtype=dtype)
    assert_selects(emulated, queries, memory, [0, 1], [60, 10])


@pytest.mark.usefixtures("every_route")
def test_rows_that_start_off_a_vector_boundary(emulated):
    queries, memory = (
        normal(2 * 3 * 8 + 1, seed=9)[1:].view(2, 3, 8),
        normal(2 * 90 * 8 + 1, seed=10)[1:].view(2, 90, 8),
    )
    assert_selects(emulated, queries, memory, [1, 0], [30, 3])


@pytest.mark.usefixtures("every_route")
@pytest.mark.parametrize("case", ["all equal", "two outliers", "infinities", "overflowing range", "subnormal"])
def test_crowded_buckets_fall_back_exactly(emulated, case):
    queries, memory = torch.ones(1, 2, 1), normal(1, 1500, 1, seed=11)
    if case == "all equal":
        memory.fill_(0.25)
    elif case == "two outliers":
        memory[0, 7], memory[0, 900] = 3e30, -3e30
    elif case == "infinities":
        memory[0, ::3], memory[0, 1::5] = torch.inf, -torch.inf
    elif case == "overflowing range":
        memory[0, ::2] = 3e38
        memory[0, 1::4] = -3e38
    else:
        memory *= 1e-41
    assert_selects(emulated, queries, memory, [0, 0, 0], [900, 700, 600])


@pytest.mark.usefixtures("every_route")
def test_infinite_scores_beyond_a_range_whose_width_overflows(emulated):
    memory = torch.tensor([1, 3e38, -torch.inf, 2, torch.inf, -3e38, torch.inf, 3])[None, :, None]
    for keep in range(1, 9):
        assert_selects(emulated, torch.ones(1, 1, 1), memory, [0, 0], [7, keep])


@pytest.mark.usefixtures("every_route")
@pytest.mark.parametrize("points", [509, 512])
def test_every_candidate_of_a_bucket_is_compared(emulated, points):
    """Up to 512 candidates of a bucket are compared with each other. Here each is the best of them for one query."""
    angles = torch.arange(points) * (2 * torch.pi / points)
    circle = torch.stack([angles.cos(), angles.sin(), torch.zeros(points)], dim=1)
    ends = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])  # make the buckets wide
    queries, memory = circle + ends[:1], torch.cat([ends[:1], 1e-4 * circle, ends[1:]])
    assert_selects(emulated, queries[None], memory[None], [0], [2])


@pytest.mark.usefixtures("every_route")
def test_nan_is_never_selected_and_zeros_of_either_sign_tie(emulated):
    queries, memory = torch.zeros(2, 1, 16), torch.zeros(2, 40, 16)
    queries[..., -1], memory[..., -1] = 1e-30, 1e-30
    memory[:, ::2] *= -1  # every score underflows, half of them to -0
    memory[0, 3, 0], memory[1, 5, 0] = torch.nan, torch.nan  # one NaN in each view
    assert_selects(emulated, queries, memory, [0, 1], [39, 38])
    memory[1, 9, 0] = torch.nan
    assert_selects(emulated, queries, memory, [0], [40])  # a view that no stage compares is not read


@pytest.mark.usefixtures("every_route")
def test_ids_exclude_empty_slots_and_the_own_source(emulated):
    queries, memory = normal(2, 4, 8, seed=12), normal(2, 150, 8, seed=13)
    ids = {"query_ids": torch.tensor([0, 1, -1, 99]), "memory_ids": integers(-1, 3, 150, seed=14)}
    assert_selects(emulated, queries, memory, [0, 1, 0], [70, 30, 30], **ids)
    assert_selects(emulated, queries, memory, [0], [150], memory_ids=ids["memory_ids"])
    ids["memory_ids"].fill_(-1)
    indices, scores = emulated.cascade_select(queries, memory, [0], [3], **ids)
    assert (indices == -1).all() and (scores == -torch.inf).all()


@pytest.mark.usefixtures("every_route")
@pytest.mark.parametrize("seed", range(12))
def test_the_cpu_kernel_gives_the_same_bits(emulated, seed):
    ops = pytest.importorskip("cpr_fast.ops", reason="the operator library is not built")
    draw = np.random.default_rng(seed)
    B, K, D, n = (int(draw.integers(1, high)) for high in (40, 900, 70, 6))
    keep = sorted((int(k) for k in draw.integers(1, K + 3, n)), reverse=True)
    views = draw.choice(3, 2, replace=False)[draw.integers(0, 2, n)].tolist()
    dtype = [torch.float32, torch.bfloat16, torch.float16][seed % 3]
    inputs = normal(3, B, D, seed=seed, dtype=dtype), normal(3, K, D, seed=seed + 100, dtype=dtype), views, keep
    ids = {"query_ids": integers(-1, 9, B, seed=seed), "memory_ids": integers(-1, 9, K, seed=seed + 1)}
    found, expected = emulated.cascade_select(*inputs, **ids), ops.cascade_select(*inputs, **ids)
    torch.testing.assert_close(list(found), list(expected), rtol=0, atol=0)


@pytest.mark.usefixtures("every_route")
def test_a_row_does_not_depend_on_its_batch(emulated):
    queries, memory = normal(2, 40, 20, seed=15), normal(2, 256, 20, seed=16)
    together = emulated.cascade_select(queries, memory, [0, 1], [100, 7])
    alone = emulated.cascade_select(queries[:, 17:18].contiguous(), memory, [0, 1], [100, 7])
    torch.testing.assert_close([t[17:18] for t in together], list(alone), rtol=0, atol=0)


def test_most_of_the_memory_is_decided_without_rescoring(emulated):
    """The streamed route uses scores of the tensor cores, and computes exact ones only near a threshold."""
    emulated.resize(**ROUTES["streamed"])
    queries, memory = unit(2, 2, 128, seed=17), unit(2, 600, 128, seed=18)
    assert_selects(emulated, queries, memory, [0, 1, 0], [300, 150, 5])
    memory[1, 40] *= 1e25  # far outside the range of the error bound
    memory[0, 41], memory[0, 42] = torch.inf, 1e-30 * memory[0, 42]
    queries[0, 1] *= 1e20
    assert_selects(emulated, queries, memory, [0, 1, 0], [300, 150, 5])
    emulated.resize()


@pytest.mark.parametrize("scale", [1e-22, 1e-12, 1.0, 1e8])
def test_ties_and_near_ties_across_a_threshold_are_refined_exactly(emulated, scale):
    # Every score is 1/2 up to rounding. Tensor cores round more, so their order is not the canonical one.
    query, noise = unit(1, 96, seed=19).double(), normal(100, 96, seed=20).double()
    memory = query / 2 + noise - (noise @ query.T) * query
    memory = memory.repeat(2, 1).float()[None]  # [1, 200, 96]: every entry appears twice
    queries = torch.stack([query.float(), unit(1, 96, seed=21)], dim=1)
    emulated.resize(**ROUTES["streamed"])
    assert_selects(emulated, queries * scale, memory * scale, [0, 0, 0], [101, 50, 7])
    emulated.resize()


@pytest.mark.parametrize("route", ["on chip", "in cache"])
def test_approximate_scores_are_those_of_rounded_features(emulated, route):
    emulated.resize(**ROUTES[route])
    queries, memory = normal(2, 5, 40, seed=21), normal(2, 300, 40, seed=22)
    before = emulated.products()
    _, scores = emulated.cascade_select(queries, memory, [0], [300], precision=1)
    assert emulated.products() > before
    rounded = (queries[0].bfloat16().double() @ memory[0].bfloat16().double().T).sort(dim=1, descending=True).values
    assert (scores.double() - rounded).abs().max() < 1e-4
    found, _ = emulated.cascade_select(queries, memory, [0, 1], [100, 20], precision=1)
    exact, _ = emulated.cascade_select(queries, memory, [0, 1], [100, 20])
    agreement = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(found.tolist(), exact.tolist(), strict=True)])
    assert agreement > 0.9
    halves = lattice(2, 5, 40, seed=23).half(), lattice(2, 300, 40, seed=24).half()  # exact in every precision
    found, expected = (emulated.cascade_select(*halves, [0, 1], [100, 20], precision=p) for p in (1, 0))
    torch.testing.assert_close(list(found), list(expected), rtol=0, atol=0)
    emulated.resize()


def test_what_the_kernel_cannot_take_is_said(emulated):
    queries, memory = normal(1, 1, 2), normal(1, 3, 2)
    with pytest.raises(RuntimeError, match="256 stages"):
        emulated.cascade_select(queries, memory, [0] * 257, [1] * 257)
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16"):
        emulated.cascade_select(queries.double(), memory.double(), [0], [1])
