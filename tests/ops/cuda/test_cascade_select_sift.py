"""Long rows of cascade_select, which a sieve from a sample of the row sifts before the stages: the same bits as on the
CPU, whether the limits from the sample are right or wrong. The kernels are executed on the host.
"""

from __future__ import annotations

import pytest
import torch
from support.operator_references import (
    LISTS_IN_SHARED_MEMORY,
    ROUTES,
    assert_cpu_selection,
    lattice,
    normal,
    random_ids,
)

ops = pytest.importorskip("cpr_fast.ops", reason="the operator library is not built")

K = 16_385  # one more than the shortest row that is sifted
LONG = 2**18 + 3  # from 2^18 entries on, the sample is longer
STAGES = [0, 1, 0, 1, 0, 1, 0]
HALVES = [K >> s for s in range(1, 7)] + [5]


# Of two views of at most 32 features: in tiles of 32 queries and 128 keys, a product of 2,048 terms for each two keys,
# of the sample and of all.
PRODUCTS_OF_A_RIGHT_SIEVE = 2 * (8192 + 129 * 128) // 2


@pytest.fixture(params=["global memory", "shared memory"])
def streamed(emulated, request):
    """A device whose stages run on lists in global memory, or in shared memory where they fit."""
    emulated.resize(**(ROUTES["streamed"] if request.param == "global memory" else LISTS_IN_SHARED_MEMORY))
    yield emulated
    emulated.resize()


@pytest.fixture
def one_view(emulated):
    """A device for rows of one view, which fit shared memory wherever their lists do."""
    emulated.resize(**ROUTES["streamed"])
    yield emulated
    emulated.resize()


def assert_selects(device, queries, memory, views, keep, **options):
    before = device.launches()
    assert_cpu_selection(device, queries, memory, views, keep, **options)
    return device.launches() - before


def test_the_published_stages_with_ids_and_rows_that_cannot_be_compared(streamed, request):
    queries, memory = normal(2, 2, 5, seed=1), normal(2, K, 5, seed=2)
    memory[0, 77], memory[1, 16_384] = torch.nan, torch.nan
    ids = random_ids(2, K, seed=3)
    # scores of the sample, sieve, pass over the memory, stages; and those of misled queries, unless the lists are in
    # shared memory
    launches = 5 if request.node.callspec.params["streamed"] == "global memory" else 4
    assert assert_selects(streamed, queries, memory, STAGES, HALVES, **ids) == launches


def test_more_queries_than_a_small_tile_has(streamed):
    queries, memory = normal(2, 33, 3, seed=39), normal(2, K, 3, seed=40)
    assert_selects(streamed, queries, memory, STAGES, HALVES, **random_ids(33, K, seed=41))


@pytest.mark.parametrize("B", [32, 64])
@pytest.mark.parametrize("precision", [0, 1])
def test_whole_tiles_without_ids(streamed, precision, B):
    """Of both sizes, and whole sectors of keys: no entry of a tile is left out. Scores are exact in 16 bits."""
    queries, memory = torch.ones(2, B, 2) * (1 + torch.arange(B))[:, None], torch.zeros(2, K - 1, 2)
    place = torch.stack([torch.randperm(K - 1, generator=torch.Generator().manual_seed(seed)) for seed in (51, 52)])
    memory[..., 0], memory[..., 1] = place // 128, place % 128 / 128
    found = streamed.cascade_select(queries, memory, STAGES, HALVES, precision=precision)
    torch.testing.assert_close(list(found), list(ops.cascade_select(queries, memory, STAGES, HALVES)), rtol=0, atol=0)


@pytest.mark.parametrize(("equal", "stay", "keep"), [(1600, 800, [8192, 30]), (1100, 1050, [8192, 4096, 30])])
def test_more_entries_than_a_stage_has_room_for(streamed, equal, stay, keep):
    """There is room for 1,408 entries at most. More have the score of the first threshold and fit their list; or of
    those that stay all pass the second stage, where 600 others have the score of the threshold."""
    place = torch.stack([torch.randperm(K, generator=torch.Generator().manual_seed(seed)) for seed in (53, 54)])
    crowd = (place[0] >= 8192 - stay) & (place[0] < 8192 - stay + equal)
    queries, memory = torch.ones(2, 1, 1), -place[..., None].float()
    memory[0, crowd], memory[1, crowd] = -8192 + stay, 1.0
    passing = (place[0] < 8192 - stay).nonzero()[:, 0]
    others = passing[place[1, passing].argsort()][4096 - stay - 300 : 4096 - stay + 300]
    memory[1, others] = memory[1, others[300]].clone()
    assert_selects(streamed, queries, memory, [0, 1, 0][: len(keep)], keep)


@pytest.mark.parametrize(
    ("views", "keep"),
    [
        ([0], [7]),
        ([1, 1, 1], [15_000, 700, 600]),  # one view, and more at the end than is ranked in shared memory
        ([0, 1, 0], [K + 5, K, 3]),  # stages that keep everything
        ([0, 1, 0], [14_800, 14_700, 14_600]),  # the first stage keeps more than there are comparable entries
        ([1, 0, 1, 0], [40, 30, 20, 10]),  # about 20 of the sample are left after the first stage, later too few
        ([0, 1, 0, 1, 0, 1, 0, 1], [9000, 9000, 4000, 4000, 4000, 900, 30, 30]),
        ([0, 1] * 4 + [0], [K >> s for s in range(1, 10)]),  # more stages than a sieve has: not sifted
    ],
)
def test_stages_of_every_kind(streamed, views, keep):
    queries, memory = normal(2, 2, 3, seed=5), normal(2, K, 3, seed=6)
    ids = random_ids(2, K, seed=7)
    assert_selects(streamed, queries, memory, views, keep, **ids)


def unusual(case: str) -> torch.Tensor:
    memory = normal(2, K, 4, seed=9)
    if case == "sorted":
        return memory[:, memory[0, :, 0].argsort()].contiguous()
    if case == "equal":
        memory.fill_(0.25)
    elif case == "few values":  # ties at every threshold: the sample cannot tell which of them are kept
        return lattice(2, K, 4, seed=10)
    elif case == "infinities":
        memory[0, ::3], memory[1, 1::5], memory[0, 7] = torch.inf, -torch.inf, torch.nan
    elif case == "denormal":
        memory *= 1e-41
    elif case == "outliers":
        memory[0, 7], memory[0, 900], memory[1, 8] = 3e30, -3e30, 1e30
    elif case == "empty":
        memory.fill_(torch.nan)
    return memory


@pytest.mark.parametrize("case", ["sorted", "equal", "few values", "infinities", "denormal", "outliers", "empty"])
def test_unusual_rows(streamed, case):
    queries = torch.cat([torch.ones(2, 1, 4), normal(2, 1, 4, seed=11)], dim=1)
    assert_selects(streamed, queries, unusual(case), [0, 1, 0, 1], [9000, 4000, 1000, 30])


@pytest.mark.parametrize("views", [[0, 1, 0], [1, 0, 1]])
@pytest.mark.parametrize("blind", [0, 1])
def test_entries_that_cannot_be_compared_in_one_view(streamed, views, blind):
    """They are at different places of a tile, score best in the other view, and are so few that the limits
    from the sample stay right."""
    queries, memory, slots = torch.ones(2, 2, 3), normal(2, K, 3, seed=18), [1000, 2001, 3002, 4003]
    memory[1 - blind, slots] += 10
    memory[blind, slots] = torch.nan
    assert_selects(streamed, queries, memory, views, [9000, 3000, 30])


def test_a_refined_threshold_that_is_infinite(streamed):
    queries = torch.cat([torch.ones(2, 1, 4), -torch.ones(2, 1, 4)], dim=1)
    for keep in ([4000, 2000, 1000, 30], [12_000, 9000, 8000, 7000]):
        assert_selects(streamed, queries, unusual("infinities"), [0, 1, 0, 1], keep)
    for size in (40, 700, 1500):  # rows that are not sifted; at last with more equal scores than a bucket holds
        memory = normal(2, size, 4, seed=19)
        memory[0, ::2], memory[1, 1::2] = torch.inf, -torch.inf
        assert_selects(streamed, queries, memory, [0, 1, 0], [size // 4, size // 8, 3])


def test_scores_that_differ_by_less_than_their_error(streamed):
    """Two large products cancel, so that the rounding of the sums orders many entries: the sieve allows for that."""
    queries, memory = normal(2, 2, 40, seed=20), 3e-4 * normal(2, K, 40, seed=22)
    queries[..., 0] = queries[..., -1] = 1
    memory[..., 0], memory[..., -1] = 1000, -1000
    assert_selects(streamed, queries, memory, [0, 1, 0, 1], [9000, 4000, 1000, 30])


def sampled_slots(entries: int = K) -> torch.Tensor:
    """Returns the slots that the sample draws, one from each of 8,192 equal parts, or of 32,768 from 2^18 entries on
    (sampled_slot in score.cuh)."""
    parts = 32_768 if entries >= 2**18 else 8192
    part = torch.arange(parts, dtype=torch.int64)
    scattered = (part + 1) * 2654435761 % 2**32
    return (part * entries + (scattered * entries >> 32)) // parts


def other_slots() -> torch.Tensor:
    return torch.ones(K).index_fill(0, sampled_slots(), 0).nonzero()[:, 0]


@pytest.mark.parametrize("view", [0, 1])
def test_scores_without_a_bound_in_one_view(streamed, view):
    """The best entries in one view have norms beyond the range of the bound on errors, and differ by less than the
    errors. In the other view, the scores of the same tile are bounded."""
    queries, memory = 0.5 + normal(2, 1, 4, seed=49).abs(), normal(2, K, 4, seed=50)
    near = 1 + 4e-6 * torch.randperm(20, generator=torch.Generator().manual_seed(51), dtype=torch.float64)
    keys, query = normal(20, 4, seed=52).double(), queries[view, 0].double()
    keys[:, 3] = (near - keys[:, :3] @ query[:3]) / query[3]
    slots = other_slots()[:20]  # so that the limits from the sample are right
    memory[view, slots] = 1e20 * keys.float()
    memory[1 - view, slots] = 40
    assert_selects(streamed, queries, memory, [1 - view, view, 1 - view, view], [9000, 4000, 30, 10])
    assert_selects(streamed, queries, memory, [view, 1 - view, view], [9000, 30, 10])


@pytest.mark.parametrize("better", [True, False])
@pytest.mark.parametrize("slots", ["sampled", "others"])
def test_a_sample_that_misleads(streamed, slots, better):
    """The entries that are sampled score higher, or lower, than all others: every limit is wrong."""
    slots = sampled_slots() if slots == "sampled" else other_slots()
    queries, memory = torch.ones(2, 2, 1), normal(2, K, 1, seed=12)
    memory[:, slots] += 10 if better else -10
    assert_selects(streamed, queries, memory, [0, 1, 0], [4096, 1024, 30])
    assert_selects(streamed, queries, memory, [0, 1, 0], [12_000, 11_000, 10_000])


@pytest.mark.parametrize("above", [0, 1, 2])
def test_a_sample_that_misleads_about_a_single_entry(streamed, above):
    """The best entries are not in the sample. The last stage keeps them, and the stage before keeps one of them less,
    as many, or one more."""
    queries, memory = torch.ones(2, 1, 1), normal(2, K, 1, seed=13)
    memory[:, other_slots()[:40]] += 20
    assert_selects(streamed, queries, memory, [1, 0, 1], [4000, 39 + above, 39])


@pytest.mark.parametrize("limit", ["low", "high"])
def test_a_sample_that_misleads_about_a_later_stage(streamed, limit):
    """The last 300 entries that the first stage keeps are close to its threshold, so that they are gathered whatever
    they score in the second view. They leave enough entries for the second stage to keep, so that only the limit shows
    that the sample has misled: its threshold is below the lower one if all sampled entries score higher there, and
    above the upper one if those of the 300 do that are not sampled."""
    place = torch.randperm(K, generator=torch.Generator().manual_seed(33))
    queries, memory = torch.ones(2, 1, 1), normal(2, K, 1, seed=34)
    memory[0, :, 0] = -place
    sampled = torch.zeros(K, dtype=torch.bool).index_fill(0, sampled_slots(), True)
    close = (place < 8192) & (place >= 8192 - 300)
    memory[1, sampled if limit == "low" else close & ~sampled] += 10
    assert_selects(streamed, queries, memory, [0, 1, 0], [8192, 200, 190])


def test_a_sample_that_misses_a_block_of_neighbours(one_view):
    """The best entries are the longest run of slots that no sampled one interrupts."""
    entries = 40_961
    slots = sampled_slots(entries)
    gap = slots.diff()
    first, after = int(slots[gap.argmax()]) + 1, int(slots[gap.argmax() + 1])
    assert after - first >= 8
    queries, memory = torch.ones(1, 1, 1), normal(1, entries, 1, seed=26)
    memory[:, first:after] += 20
    assert_selects(one_view, queries, memory, [0, 0], [900, after - first])


@pytest.mark.parametrize(
    ("views", "keep"),
    [
        (STAGES, [LONG >> s for s in range(1, 7)] + [5]),
        pytest.param([1, 1], [LONG - 7, 3], marks=pytest.mark.slow),  # one view
    ],
)
def test_long_samples(one_view, views, keep):
    """Of 32,768 entries. A sample that is taken for wrong costs the products of all scores once more. Features and
    scores are those that 16 bits hold exactly."""
    queries, memory = torch.ones(2, 1, 3), torch.zeros(2, LONG, 3)
    for view in (0, 1):
        place = torch.randperm(LONG, generator=torch.Generator().manual_seed(45 + view))
        memory[view] = torch.stack([place // 2**14, place // 128 % 128 / 128, place % 128 / 2**14], dim=1)
    memory[0, 77], memory[1, LONG - 1] = torch.nan, torch.nan
    ids, before = random_ids(1, LONG, seed=47), one_view.products()
    found = one_view.cascade_select(queries, memory, views, keep, precision=1, **ids)
    assert one_view.products() - before == len(set(views)) * (32_768 + -(-LONG // 128) * 128) // 2
    torch.testing.assert_close(
        list(found), list(ops.cascade_select(queries, memory, views, keep, **ids)), rtol=0, atol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("better", [True, False])
def test_a_long_sample_that_misleads(one_view, better):
    queries, memory = torch.ones(2, 1, 1), normal(2, LONG, 1, seed=48)
    memory[:, sampled_slots(LONG)] += 10 if better else -10
    assert_selects(one_view, queries, memory, [0, 1, 0], [LONG // 4, 9000, 30])


@pytest.mark.parametrize("sample", ["empty", "not comparable", "all there is"])
def test_a_sample_that_has_nothing_or_everything(streamed, sample):
    """The sampled entries are empty or cannot be compared, or all others are empty: then the first stage keeps every
    entry, although the sample has more than it keeps."""
    queries, memory, ids = torch.ones(2, 2, 2), normal(2, K, 2, seed=27), torch.arange(K)
    if sample == "not comparable":
        memory[0, sampled_slots()] = torch.nan
    else:
        ids[sampled_slots() if sample == "empty" else other_slots()] = -1
    assert_selects(streamed, queries, memory, [0, 1, 0], [9000, 3000, 30], memory_ids=ids)


@pytest.mark.parametrize("precision", [0, 1])
def test_misled_queries_beside_others_and_more_than_blocks(one_view, precision):
    """One block selects again for the two misled queries, whose features are in other columns than those of the rest.
    Scores are integers of eight bits, which every precision holds."""
    one_view.resize(**ROUTES["streamed"], processors=1)
    queries, memory = torch.zeros(1, 4, 3), torch.zeros(1, K, 3)
    queries[0, [0, 1, 2, 3], [0, 1, 0, 2]] = 1
    memory[0, :, 0] = torch.randperm(K, generator=torch.Generator().manual_seed(28)) // 128
    memory[0, other_slots(), 1], memory[0, other_slots()[::2], 2] = 2, 1
    inputs = queries, memory, [0, 0], [900, 700]
    found = one_view.cascade_select(*inputs, precision=precision)
    torch.testing.assert_close(list(found), list(ops.cascade_select(*inputs)), rtol=0, atol=0)


@pytest.mark.parametrize("slots", [[0, 261, 5 * 128 + 31], [128 + 64, 3 * 128 + 100, 9 * 128 + 127]])
@pytest.mark.parametrize("view", [0, 1])
def test_a_single_key_whose_score_has_a_great_error(streamed, slots, view):
    """Two terms of bfloat16 do not hold 131,329, so that tensor cores score these keys 0 instead of 1. Their norm must
    keep all entries of their tile from being settled, wherever in it they are, and widen the refined range, also if
    none is in the first tile."""
    queries, memory = torch.ones(2, 2, 2), 0.1 * normal(2, K, 2, seed=29)
    memory[view, slots] = torch.tensor([131_329.0, -131_328.0])
    assert_selects(streamed, queries, memory, [view, 1 - view, view], [4000, 2500, 30])
    indices, _ = ops.cascade_select(queries, memory, [view], [len(slots)])
    assert indices[0].tolist() == sorted(slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_view_whose_scores_are_parked(one_view, dtype):
    """The scores of a single view are left in shared memory as those of the first of two are."""
    queries, memory = normal(1, 3, 3, seed=30, dtype=dtype), normal(1, K, 3, seed=31, dtype=dtype)
    memory[0, 4] = torch.nan
    assert_selects(one_view, queries, memory, [0, 0, 0], [8000, 700, 5], **random_ids(3, K, seed=32))


@pytest.mark.parametrize("case", ["distinct", "ties", "one view"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_approximate_scores(streamed, case, dtype):
    """Features and scores that 16 bits hold exactly. Ties mislead the sample."""
    queries, memory = torch.ones(2, 2, 2, dtype=dtype), torch.zeros(2, K, 2)
    place = torch.stack([torch.randperm(K, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    memory[..., 0] = place // 128
    if case != "ties":
        memory[..., 1] = place % 128 / 128
    memory[1, 5, 1] = torch.nan
    inputs = queries, memory.to(dtype), [1, 1, 1] if case == "one view" else [0, 1, 0], [9000, 3000, 30]
    ids = random_ids(2, K, seed=24)
    found = streamed.cascade_select(*inputs, precision=1, **ids)
    expected = ops.cascade_select(*inputs, **ids)
    torch.testing.assert_close(list(found), list(expected), rtol=0, atol=0)


def test_approximate_scores_that_are_all_alike(streamed):
    """From 1 to 1.03, where bfloat16 has four values. Taken by themselves they would not be settled."""
    queries, memory, keep = torch.ones(2, 1, 3), torch.ones(2, K, 3), [*HALVES[:6], 120]
    place = torch.stack([torch.randperm(K, generator=torch.Generator().manual_seed(seed)) for seed in (55, 56)])
    memory[..., 1], memory[..., 2] = place // 128 / 2**12, place % 128 / 2**19
    before = streamed.products()
    found = streamed.cascade_select(queries, memory, STAGES, keep, precision=1)
    assert streamed.products() - before == PRODUCTS_OF_A_RIGHT_SIEVE
    torch.testing.assert_close(list(found), list(ops.cascade_select(queries, memory, STAGES, keep)), rtol=0, atol=0)


def test_approximate_scores_without_an_end(streamed):
    """Infinite ones of either sign, the greatest that there are, and zeros of either sign."""
    queries, memory = torch.tensor([1.0, -1.0])[:, None].repeat(2, 1, 2), lattice(2, K, 2, seed=57)
    memory[0, ::7], memory[1, 3::11], memory[0, 5] = torch.inf, -torch.inf, torch.nan
    memory[0, 8::13, 0], memory[0, 8::13, 1], memory[1, 9::17] = 3e38, 0, -0.0
    inputs = queries.bfloat16(), memory.bfloat16(), [0, 1, 0, 1], [9000, 4000, 2500, 900]
    found = streamed.cascade_select(*inputs, precision=1)
    torch.testing.assert_close(list(found), list(ops.cascade_select(*inputs)), rtol=0, atol=0)


@pytest.mark.parametrize(("blind", "keep"), [(0, 600), (1, 600), (0, 9000)])
def test_approximate_scores_that_cannot_be_compared_in_one_view(streamed, blind, keep):
    """The last stage keeps all that the first does, and has room for it; so the result would hold every such entry."""
    queries, memory, slots = torch.ones(2, 1, 2), torch.zeros(2, K, 2), other_slots()[[500, 1000, 1500, 2000]]
    place = torch.stack([torch.randperm(K, generator=torch.Generator().manual_seed(seed)) for seed in (37, 38)])
    memory[..., 0], memory[..., 1] = place // 128, place % 128 / 128
    memory[1 - blind, slots, 0], memory[blind, slots] = 200, torch.nan
    inputs, before = (queries, memory, [0, 1], [keep, keep]), streamed.products()
    found = streamed.cascade_select(*inputs, precision=1)
    assert streamed.products() - before == PRODUCTS_OF_A_RIGHT_SIEVE
    torch.testing.assert_close(list(found), list(ops.cascade_select(*inputs)), rtol=0, atol=0)


def test_a_sample_that_is_right_spares_the_pass_of_misled_queries(streamed):
    """A sieve that is taken for wrong changes no result, but costs the products of all scores once more. Features and
    scores are as in test_approximate_scores."""
    queries, memory, keep = torch.ones(2, 1, 2), torch.zeros(2, K, 2), [*HALVES[:6], 120]
    place = torch.stack([torch.randperm(K, generator=torch.Generator().manual_seed(seed)) for seed in (35, 36)])
    memory[..., 0], memory[..., 1] = place // 128, place % 128 / 128
    before = streamed.products()
    found = streamed.cascade_select(queries, memory, STAGES, keep, precision=1)
    assert streamed.products() - before == PRODUCTS_OF_A_RIGHT_SIEVE
    torch.testing.assert_close(list(found), list(ops.cascade_select(queries, memory, STAGES, keep)), rtol=0, atol=0)


def test_a_sample_whose_ids_matter(streamed):
    """The second half of the memory is empty. Its rows read as zeros, which would score best."""
    queries, memory, ids = torch.ones(2, 1, 2), torch.zeros(2, K, 2), torch.arange(K)
    place = torch.stack([torch.randperm(K, generator=torch.Generator().manual_seed(seed)) for seed in (42, 43)])
    memory[..., 0], memory[..., 1] = -1 - place // 128, place % 128 / 128
    ids[K // 2 :] = -1
    inputs = queries, memory, [0, 1, 0], [4000, 2000, 100]
    before = streamed.products()
    found = streamed.cascade_select(*inputs, memory_ids=ids, precision=1)
    assert streamed.products() - before == PRODUCTS_OF_A_RIGHT_SIEVE
    torch.testing.assert_close(list(found), list(ops.cascade_select(*inputs, memory_ids=ids)), rtol=0, atol=0)


@pytest.mark.slow
def test_several_chunks(one_view):
    """The sample misleads the last query alone, which is in the last of three chunks of 64 queries."""
    queries, memory = normal(1, 129, 3, seed=14), normal(1, K, 3, seed=15)
    queries[:, :128, 2], queries[:, 128] = 0, torch.tensor([0.0, 0.0, 1.0])
    memory[:, other_slots(), 2] += 10
    assert assert_selects(one_view, queries, memory, [0, 0], [900, 9]) == 3 * 5
