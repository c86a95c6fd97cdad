"""cascade_select under the sanitizer, in every route, and bit for bit against the CPU kernel."""

from __future__ import annotations

import pytest
import torch
from support.operator_references import LISTS_IN_SHARED_MEMORY, ROUTES, lattice, normal
from support.operator_references import assert_cpu_selection as assert_selects
from support.operator_references import random_ids as ids

ops = pytest.importorskip("cpr_fast.ops", reason="the operator library is not built")

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def choose(device, route: str) -> None:
    device.resize(**ROUTES[route])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("B", "K", "D"), [(3, 700, 24), (37, 192, 36)])  # small tiles; large ones, K % 128 == 64
def test_every_route_and_order(device, route, B, K, D):
    choose(device, route)
    queries, memory = normal(3, B, D, seed=1), normal(3, K, D, seed=2)
    assert_selects(device, queries, memory, [2, 0, 2], [K // 2, K // 4, 5], **ids(B, K))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("offset", [0, 1, 4])  # elements that rows start off a vector; 4: off 16 bytes, if of 16 bits
def test_every_type_on_and_off_a_vector(shuffled, route, dtype, offset):
    choose(shuffled, route)
    shuffled.offset = offset
    # 64: whole panels of the tensor cores; 160: more whole panels of a small tile than are in shared memory at once
    for B, D in ((33, 33), (2, 20), (34, 64), (3, 160)):
        queries, memory = normal(2, B, D, seed=3, dtype=dtype), normal(2, 130, D, seed=4, dtype=dtype)
        assert_selects(shuffled, queries, memory, [1, 0], [60, 7], **ids(B, 130))


@pytest.mark.parametrize("route", ["in cache", "streamed"])
def test_several_chunks_with_ids(shuffled, route):
    # The cache holds the rows of 32 queries; or none, then chunks have the 64 queries of a tile.
    shuffled.resize(shared_limit=0, cache_size=200_000 if route == "in cache" else 0)
    queries, memory = lattice(2, 133, 4, seed=5), lattice(2, 300, 4, seed=6)
    memory[1, 150], queries[0, 130] = 1e25, 1e20  # outside the bound of refined scores, in both chunks
    before = shuffled.launches()
    assert_selects(shuffled, queries, memory, [1, 0], [120, 3], **ids(133, 300, seed=7))
    assert shuffled.launches() - before == (4 if route == "in cache" else 9)


@pytest.mark.parametrize("route", ROUTES)
def test_rankings_beyond_shared_memory(shuffled, route):
    choose(shuffled, route)
    queries, memory = lattice(2, 2, 3, seed=8), normal(2, 1300, 3, seed=9)
    assert_selects(shuffled, queries, memory, [0, 1], [1200, 700])
    assert_selects(shuffled, queries[:, :1], memory[:, :600].contiguous(), [0], [900], **ids(1, 600))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("equal", [511, 512, 513, 1500])
def test_buckets_nearly_exactly_and_over_full(shuffled, route, equal):
    """A bucket holds the candidates for the last place; up to 512 are compared, more go through the radix."""
    choose(shuffled, route)
    queries, memory = torch.ones(1, 2, 1), torch.linspace(-1, 1, 1500)[None, :, None].clone()
    memory[0, torch.randperm(1500, generator=torch.Generator().manual_seed(0))[:equal]] = 0.9995
    above = int((memory > 0.9995).sum())
    for keep in (above + 1, above + equal // 2, above + equal):
        assert_selects(shuffled, queries, memory, [0, 0], [keep, min(keep, 600)])


@pytest.mark.parametrize("route", ROUTES)
def test_subsets_of_the_stages_in_every_order(shuffled, route):
    """A stage that keeps everything is skipped, wherever it stands."""
    choose(shuffled, route)
    queries, memory = normal(2, 2, 8, seed=10), normal(2, 530, 8, seed=11)
    for keep in ([600, 530, 20], [530, 40, 40], [40, 40, 40], [600, 600, 520]):
        for views in ([0, 1, 0], [1, 1, 0]):
            assert_selects(shuffled, queries, memory, views, keep, **ids(2, 530))


def test_norms_outside_the_bound_of_refined_scores(shuffled):
    choose(shuffled, "streamed")
    queries, memory = normal(2, 35, 40, seed=12), normal(2, 300, 40, seed=13)
    memory[1, 40] *= 1e25
    memory[0, 41], memory[0, 42], memory[1, 43] = torch.inf, 1e-30 * memory[0, 42], torch.nan
    queries[0, 1] *= 1e20
    queries[1, 34] *= 1e22
    assert_selects(shuffled, queries, memory, [0, 1, 0], [150, 70, 5], **ids(35, 300))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", TYPES)
def test_approximate_scores(shuffled, route, dtype):
    choose(shuffled, route)
    for D in (20, 64):
        queries, memory = lattice(2, 34, D, seed=14).to(dtype), lattice(2, 150, D, seed=15).to(dtype)  # exact
        found = shuffled.cascade_select(queries, memory, [0, 1], [50, 9], precision=1, **ids(34, 150))
        expected = ops.cascade_select(queries, memory, [0, 1], [50, 9], **ids(34, 150))
        torch.testing.assert_close(list(found), list(expected), rtol=0, atol=0)


SIFTED = 16_385  # one more than the shortest row that is sifted


def test_sifted_rows_in_every_order(device):
    choose(device, "streamed")
    queries, memory = normal(2, 2, 3, seed=20), normal(2, SIFTED, 3, seed=21)
    memory[0, 9] = torch.nan
    assert_selects(device, queries, memory, [0, 1, 0, 1], [8000, 4000, 900, 5], **ids(2, SIFTED))


@pytest.mark.parametrize("precision", [0, 1])
def test_sifted_rows_whose_lists_are_in_shared_memory(shuffled, precision):
    shuffled.resize(**LISTS_IN_SHARED_MEMORY)
    place = torch.stack([torch.randperm(SIFTED, generator=torch.Generator().manual_seed(seed)) for seed in (28, 29)])
    queries, memory = torch.ones(2, 3, 3), torch.zeros(2, SIFTED, 3)
    memory[..., 0], memory[..., 2] = place // 128, place % 128 / 128  # exact in bfloat16, and so are the scores
    memory[0, 9] = torch.nan
    inputs = queries, memory, [0, 1, 0, 1], [8000, 4000, 900, 5]
    found = shuffled.cascade_select(*inputs, precision=precision, **ids(3, SIFTED))
    expected = ops.cascade_select(*inputs, **ids(3, SIFTED))
    torch.testing.assert_close(list(found), list(expected), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("B", [3, 66])
def test_a_block_with_several_tiles(shuffled, B, dtype):
    """On a device of one multiprocessor, blocks take several tiles of the memory one after the other."""
    shuffled.resize(**ROUTES["streamed"], processors=1)
    queries, memory = normal(2, B, 3, seed=26, dtype=dtype), normal(2, 1300, 3, seed=27, dtype=dtype)
    memory[:, 128:256] *= 1000  # errors of the second tile are far above those of others
    assert_selects(shuffled, queries, memory, [0, 1, 0], [600, 300, 5], **ids(B, 1300))


@pytest.mark.parametrize("dtype", TYPES[:2])
def test_sifted_rows_of_one_view(shuffled, dtype):
    choose(shuffled, "streamed")
    queries, memory = normal(1, 2, 3, seed=22, dtype=dtype), normal(1, SIFTED + 1, 3, seed=23, dtype=dtype)
    assert_selects(shuffled, queries, memory, [0, 0], [8000, 600])


@pytest.mark.parametrize("precision", [0, 1])
@pytest.mark.parametrize(
    "limits",
    [
        ROUTES["streamed"] | {"processors": 1},  # one block selects for both queries again
        LISTS_IN_SHARED_MEMORY,  # the block of each query selects again
    ],
)
def test_sifted_rows_with_ties_that_mislead_the_sample(shuffled, limits, precision):
    shuffled.resize(**limits)
    queries, memory = lattice(2, 2, 3, seed=24), lattice(2, SIFTED + 2, 3, seed=25)  # exact in bfloat16
    views, keep = [0, 1, 0], [9000, 4000, 30]
    found = shuffled.cascade_select(queries, memory, views, keep, precision=precision)
    expected = ops.cascade_select(queries, memory, views, keep)
    torch.testing.assert_close(list(found), list(expected), rtol=0, atol=0)


@pytest.mark.parametrize("use", [0, 1])
def test_a_route_with_more_than_48_kib_on_either_device(shuffled, use):
    shuffled.resize()
    queries, memory = normal(2, 2, 3, seed=16), normal(2, 6_000, 3, seed=17)
    for now in (1 - use, use):  # what one device was allowed says nothing about the other
        shuffled.use(now)
        assert_selects(shuffled, queries, memory, [1, 0], [900, 3])
    fewer = memory[:, :5_000].contiguous()  # needs less, but still more than 48 KiB: nothing is lowered
    assert_selects(shuffled, queries, fewer, [1, 0], [900, 3])
    assert_selects(shuffled, queries, memory, [1, 0], [900, 3])


@pytest.mark.parametrize(
    ("route", "dtype", "K", "D"),
    [
        ("in cache", torch.float32, 530_000, 8192),
        ("streamed", torch.bfloat16, 1_060_000, 4096),
        ("streamed", torch.float32, 1_060_000, 4096),
    ],
)
def test_a_memory_of_more_than_2_to_the_32_elements(shuffled, route, dtype, K, D):
    """Entries lie beyond 32-bit offsets: all but a few are zeros, whose scores need not be computed."""
    B = 1
    shuffled.choose_blocks("edges")
    shuffled.resize(shared_limit=0, cache_size=1 << 30 if route == "in cache" else 0)
    queries, memory = shuffled.allocate("queries", (2, B, D), dtype), shuffled.allocate("memory", (2, K, D), dtype)
    queries[:, :, :4096:512] = normal(2, B, 8, seed=18, dtype=dtype)
    for part in (slice(0, 40), slice(K - 40, K)):  # the blocks that run hold these
        memory[:, part, :4096:512] = normal(2, 40, 8, seed=19, dtype=dtype)
    found = shuffled.cascade_select(queries, memory, [1], [5])  # few: all of them score more than zero
    shown = torch.cat([memory[:, :40], memory[:, -40:]], dim=1)
    indices, scores = ops.cascade_select(queries, shown, [1], [5])
    assert scores.min() > 0
    assert torch.equal(found[1], scores) and torch.equal(found[0], torch.where(indices < 40, indices, indices + K - 80))


def test_outputs_of_more_than_2_to_the_32_elements(shuffled):
    B, K = 8_800_000, 500
    shuffled.choose_blocks("edges")
    shuffled.resize(cache_size=2_000_000_000)
    queries, memory = shuffled.allocate("queries", (1, B, 1)), torch.linspace(-1, 1, K)[None, :, None].clone()
    queries[0, -1] = 1
    indices, scores = shuffled.cascade_select(queries, memory, [0], [K])
    assert torch.equal(indices[-1], torch.arange(K).flip(0)) and torch.equal(scores[-1], memory[0, :, 0].flip(0))
