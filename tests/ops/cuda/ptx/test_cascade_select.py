"""cascade_select from the PTX of its kernels: every route and tile, bit for bit against the CPU kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[4] / "bench" / "ptx"))

import ptx_cases
from support.cuda_emulation.compile import SOURCES
from support.operator_references import LISTS_IN_SHARED_MEMORY, ROUTES, lattice, normal
from support.operator_references import assert_cpu_selection as assert_selects
from support.operator_references import random_ids as ids
from support.ptx.interpreter import Count

ops = pytest.importorskip("cpr_fast.ops", reason="the operator library is not built")

TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", TYPES)
def test_every_route_and_type_with_small_and_large_tiles(device, route, dtype):
    device.resize(**ROUTES[route])
    before = device.products()
    for B, K, D in ((3, 700, 24), (37, 192, 33), (35, 150, 64)):
        queries, memory = normal(3, B, D, seed=1, dtype=dtype), normal(3, K, D, seed=2, dtype=dtype)
        assert_selects(device, queries, memory, [2, 0, 2], [K // 2, K // 4, 5], **ids(B, K))
    assert (device.products() > before) == (route == "streamed")


@pytest.mark.parametrize(("processors", "blocks"), [(132, 11), (6, 6), (3, 3)])
def test_the_tiles_of_few_queries_take_the_least_time(device, processors, blocks):
    """A multiprocessor more than tiles of 32, 64 or 128 keys would be idle; fewer would take two rounds."""
    device.resize(processors=processors)
    device.reset_counts()
    queries, memory = normal(1, 3, 64, seed=24), normal(1, 330, 64, seed=25)
    assert_selects(device, queries, memory, [0], [100])
    scores = [launch for launch in device.launches_of("cascade_select") if "12score_kernel" in launch.kernel]
    assert [launch.grid for launch in scores] == [(blocks, 1, 1)]
    device.resize()


@pytest.mark.parametrize("keep", [[4000, 600, 40], [3000, 512, 32, 5]])
def test_survivors_are_handed_from_thread_to_thread(device, keep):
    device.resize()
    queries, memory = lattice(2, 1, 3, seed=26), normal(2, 16_389, 3, seed=27)
    assert_selects(device, queries, memory, [1, 0, 1, 1][: len(keep)], keep)


@pytest.mark.parametrize("order", ["backward", "shuffled"])
@pytest.mark.parametrize("route", ROUTES)
def test_no_order_of_warps_and_blocks_changes_a_bit(device, route, order):
    device.resize(**ROUTES[route])
    device.set_order(order)
    queries, memory = lattice(2, 3, 24, seed=3), lattice(2, 700, 24, seed=4)
    assert_selects(device, queries, memory, [1, 0, 1], [350, 175, 5])


@pytest.mark.parametrize("route", ["in cache", "streamed"])
def test_several_chunks_and_rankings_beyond_shared_memory(device, route):
    device.resize(shared_limit=0, cache_size=200_000 if route == "in cache" else 0)
    queries, memory = lattice(2, 133, 4, seed=5), lattice(2, 300, 4, seed=6)
    assert_selects(device, queries, memory, [1, 0], [120, 3], **ids(133, 300, seed=7))
    device.resize(**ROUTES[route])
    queries, memory = lattice(2, 2, 3, seed=8), normal(2, 1300, 3, seed=9)
    assert_selects(device, queries, memory, [0, 1], [1200, 700])


@pytest.mark.parametrize("route", ROUTES)
def test_crowded_buckets_nan_and_infinities(device, route):
    device.resize(**ROUTES[route])
    queries, memory = torch.ones(2, 2, 1), normal(2, 1500, 1, seed=10)
    memory[:, 100:700] = 0.25  # more equal scores than a bucket holds
    memory[0, 3], memory[1, 5], memory[0, 7], memory[1, 9] = torch.nan, torch.nan, torch.inf, -torch.inf
    assert_selects(device, queries, memory, [0, 1, 0], [900, 700, 600])


@pytest.mark.parametrize(("group", "extra_bits"), [(4, 0), (8, 1), (16, 2), (16, 0)])
def test_refined_scores_are_exact_however_tensor_cores_add(device, group, extra_bits):
    """The published models of V100, A100 and H100 and a coarser one: the bound covers each."""
    device.resize(**ROUTES["streamed"])
    device.set_product_model(group, extra_bits)
    queries, memory = normal(2, 3, 128, seed=11), normal(2, 400, 128, seed=12)
    memory[:, 200:] = memory[:, :200] * (1 + 1e-6)  # near ties across every threshold
    assert_selects(device, queries, memory, [0, 1, 0], [201, 101, 5])
    device.set_product_model(*((8, 1) if device.architecture == "80" else (16, 2)))


def counts_of_lines(device, file: str, code: str) -> list[Count]:
    """What the instructions of the lines with this text in a file of the kernels did."""
    source = (SOURCES / "cuda" / "cascade_select" / file).read_text().splitlines()
    lines = {i for i, text in enumerate(source, 1) if code in text}
    return [c for c in device.counts("cascade_select") if Path(c.file).name == file and c.line in lines]


def unsifted(device) -> int:
    """How often warps looked at entries because a sieve was wrong, or because there was none."""
    return sum(count.executed for count in counts_of_lines(device, "stages.cuh", "number &= !isnan(rows"))


@pytest.mark.parametrize(("B", "views"), [(3, [1, 0, 1]), (33, [1, 0, 1]), (3, [1, 1, 1])])
@pytest.mark.parametrize("precision", [0, 1])
def test_scores_are_parked_without_bank_conflicts(device, precision, B, views):
    """In tiles of 32 queries and of 64; also those of one view alone, which are parked as well. Gathered entries read
    the scores of any lane."""
    device.resize(**ROUTES["streamed"])
    queries, memory = lattice(2, B, 24, seed=22), lattice(2, 300, 24, seed=23)  # exact in bfloat16
    found = device.cascade_select(queries, memory, views, [150, 75, 5], precision=precision)
    expected = ops.cascade_select(queries, memory, views, [150, 75, 5])
    torch.testing.assert_close(list(found), list(expected), rtol=0, atol=0)
    parked = [count for count in counts_of_lines(device, "stream.cuh", "parked[e]") if count.kind == "store shared"]
    assert sum(count.units for count in parked) == sum(count.least for count in parked) > 0


def test_a_sieve_from_a_long_sample(device):
    device.resize(**ROUTES["streamed"])
    K = 2**18 + 3
    queries, memory = normal(2, 1, 4, seed=24), normal(2, K, 4, seed=25)
    assert_selects(device, queries, memory, [0, 1, 0, 1, 0, 1, 0], [K >> s for s in range(1, 7)] + [5], **ids(1, K))
    assert unsifted(device) == 0


@pytest.mark.parametrize("limits", [ROUTES["streamed"], LISTS_IN_SHARED_MEMORY])
def test_a_sieve_decides_long_rows_of_distinct_scores(device, limits):
    device.resize(**limits)
    K = 16_387
    queries, memory = normal(2, 3, 4, seed=16), normal(2, K, 4, seed=17)
    views, keep = [0, 1, 0, 1, 0, 1, 0], [K >> s for s in range(1, 7)] + [5]
    assert_selects(device, queries, memory, views, keep, **ids(3, K))
    assert unsifted(device) == 0
    filled = {"memory_ids": torch.arange(K).masked_fill(torch.arange(K) > 0.3 * K, -1)}
    assert_selects(device, queries, memory, views, keep, **filled)
    assert unsifted(device) == 0  # the first stage keeps everything that is there
    close = 0.99 * queries.mean(1, keepdim=True) + 0.01 * memory  # scores that differ less than bfloat16 rounds a query
    assert_selects(device, queries, close, views, keep)
    assert unsifted(device) == 0
    assert_selects(device, lattice(2, 1, 3, seed=18), lattice(2, K, 3, seed=19), views, keep)
    assert unsifted(device) >= K / 32  # many ties


@pytest.mark.parametrize("order", ["backward", "shuffled"])
def test_no_order_of_warps_and_blocks_changes_a_sifted_row(device, order):
    device.resize(**ROUTES["streamed"])
    device.set_order(order)
    queries, memory = normal(2, 2, 3, seed=20), normal(2, 16_386, 3, seed=21)
    assert_selects(device, queries, memory, [1, 0, 1], [9000, 4000, 700])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", TYPES)
def test_approximate_scores(device, route, dtype):
    device.resize(**ROUTES[route])
    for D in (20, 64):
        queries, memory = lattice(2, 34, D, seed=14).to(dtype), lattice(2, 150, D, seed=15).to(dtype)  # exact
        found = device.cascade_select(queries, memory, [0, 1], [50, 9], precision=1)
        expected = ops.cascade_select(queries, memory, [0, 1], [50, 9])
        torch.testing.assert_close(list(found), list(expected), rtol=0, atol=0)


@pytest.mark.parametrize("precision", [0, 1])
def test_features_of_16_bits_are_read_in_half_of_the_sectors(device, precision):
    """In whole vectors: a request for each element would take as many sectors as float features, or more."""
    device.resize(**ROUTES["streamed"])
    sectors = []
    for dtype in TYPES:
        queries, memory = lattice(2, 64, 128, seed=30).to(dtype), lattice(2, 256, 128, seed=31).to(dtype)
        device.reset_counts()
        found = device.cascade_select(queries, memory, [0, 1], [128, 5], precision=precision)
        expected = ops.cascade_select(queries, memory, [0, 1], [128, 5])
        torch.testing.assert_close(list(found), list(expected), rtol=0, atol=0)
        counts = [count for count in device.counts("cascade_select") if "stream_kernel" in count.function]
        read = [count for count in counts if count.kind in ("load global", "copy async") and count.executed]
        sectors.append(sum(count.units for count in read))
    whole = 2 * (64 * 2 + 256) * 128 * 4 / 32  # two tiles of keys read the queries
    assert sectors[0] == pytest.approx(whole, rel=0.1)
    assert sectors[1] == sectors[2] == pytest.approx(whole / 2, rel=0.1)


A100, H100 = ptx_cases.DEVICES["A100"], ptx_cases.DEVICES["H100"]


def blocks_of(device, B: int, K: int, gpu: tuple[tuple[int, int, int], int], kernel: str) -> list[int]:
    """Returns the blocks of each launch of a kernel in a call of two views and seven stages, without executing it.
    gpu: its limits and compute capability."""
    launches = ptx_cases.plan(device, ptx_cases.Call("cascade_select", "fp32", B, K), *gpu)
    return [launch.grid[0] for launch in launches if kernel in launch.kernel]


def test_chunks_on_chip_occupy_all_multiprocessors(device):
    assert blocks_of(device, 256, 16384, H100, "select_on_chip_kernel") == [128, 128]  # not 250 and 6
    # 132 multiprocessors take two rounds for 250 queries and one for 50, as many as for two chunks of 150.
    assert blocks_of(device, 300, 16384, H100, "select_on_chip_kernel") == [250, 50]


def test_many_queries_that_take_several_chunks_are_streamed_where_float32_is_slow(device):
    assert blocks_of(device, 200, 16384, A100, "select_on_chip_kernel") == [200]
    assert not blocks_of(device, 201, 16384, A100, "select_on_chip_kernel")
    assert blocks_of(device, 201, 16384, A100, "streamed_stages_kernel") == [201]
    assert blocks_of(device, 1024, 8192, A100, "select_on_chip_kernel") == [400, 400, 224]
    assert blocks_of(device, 256, 16384, (A100[0], 86), "select_on_chip_kernel") == [200, 56]  # fast arithmetic


def test_lists_go_through_the_stages_in_shared_memory_where_they_fit(device):
    """Two queries share a multiprocessor up to 65,536 entries. Of few queries, each selects again by itself if its
    sieve was wrong; of more, a kernel of their own does."""

    def stages(B: int, K: int, gpu: tuple[tuple[int, int, int], int]) -> tuple[int, bool]:
        launches = ptx_cases.plan(device, ptx_cases.Call("cascade_select", "fp32", B, K), *gpu)
        (found,) = [launch for launch in launches if "streamed_stages_kernel" in launch.kernel]
        return found.shared_bytes, any("misled" in launch.kernel for launch in launches)

    for gpu in (A100, H100):
        assert stages(32, 65536, gpu)[0] <= 81 << 10  # half of the shared memory of an A100
        for K in (32768, 65536, 1 << 17, 1 << 18):
            assert stages(32, K, gpu)[0] > 50 << 10 and not stages(32, K, gpu)[1]
            assert stages(256, K, gpu) == (stages(32, K, gpu)[0], True)
        assert stages(32, 1 << 19, gpu)[0] < 20 << 10  # in global memory
    assert not stages(108, 32768, A100)[1] and stages(109, 32768, A100)[1]  # more queries than multiprocessors


@pytest.mark.parametrize("gpu", [A100, H100])
def test_lists_of_the_longest_memories_are_of_128_queries(device, gpu):
    assert blocks_of(device, 256, 1 << 22, gpu, "streamed_stages_kernel") == [128, 128]
