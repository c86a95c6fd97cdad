"""The CUDA kernels' logic, executed on the host from their unmodified source (tests/support/cuda_emulation).

Threads are fibers, so this shows wrong indexing, missing barriers, reads of what nothing wrote, divergent barriers;
not what only hardware shows (memory ordering between warps, speed). tests/ops/test_cascade_select.py and
tests/ops/test_mil_nce.py run the same contracts on a GPU where there is one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.cuda_emulation.device import REPOSITORY

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernels for the host")


ROUTES = {  # of cascade_select, by what the device has
    "on chip": {},
    "in cache": {"shared_limit": 0},
    "refined": {"shared_limit": 0, "cache_size": 0},
}


@pytest.fixture(params=ROUTES)
def every_route(request, emulated):
    """The same call through every route; the refined one must have used tensor cores."""
    emulated.resize(**ROUTES[request.param])
    before = emulated.products()
    yield request.param
    assert (emulated.products() > before) == (request.param == "refined")
    emulated.resize()


# ---- oracles --------------------------------------------------------------------------------------------------------


def fma_scores(queries: torch.Tensor, memory: torch.Tensor) -> np.ndarray:
    """The canonical score [B, K]: a float32 chain of fused multiply-adds over d from +0, every step rounded once.

    The product of two floats is exact in double; the sum is rounded to odd there, which makes rounding it once more
    to float32 the same as rounding the exact sum.
    """
    q, k = queries.float().numpy().astype(np.float64), memory.float().numpy().astype(np.float64)
    acc = np.zeros((q.shape[0], k.shape[0]))
    with np.errstate(invalid="ignore", over="ignore"):
        for d in range(q.shape[1]):
            product = q[:, d : d + 1] * k[:, d]
            total = product + acc
            part = total - product
            error = (product - (total - part)) + (acc - part)
            inexact = (error != 0) & np.isfinite(total) & (total.view(np.int64) & 1 == 0)
            odd = np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total)
            acc = odd.astype(np.float32).astype(np.float64)
    return acc.astype(np.float32)


def select_by_sorting(queries, memory, views, keep, query_ids=None, memory_ids=None):
    """cascade_select by full sorts in (score descending, slot ascending) over the canonical scores."""
    B, K = queries.shape[1], memory.shape[1]
    rows = {v: fma_scores(queries[v], memory[v]) for v in set(views)}
    indices, scores = np.full((B, keep[-1]), -1), np.full((B, keep[-1]), -np.inf, np.float32)
    for b in range(B):
        alive = np.ones(K, bool)
        if memory_ids is not None:
            alive &= memory_ids.numpy() != -1
            if query_ids is not None:
                alive &= memory_ids.numpy() != query_ids[b].item()
        for row in rows.values():
            alive &= ~np.isnan(row[b])
        slots = np.flatnonzero(alive)
        for view, count in zip(views, keep, strict=True):
            slots = np.sort(slots)
            slots = slots[np.argsort(-rows[view][b, slots], kind="stable")][:count]
        indices[b, : len(slots)] = slots
        scores[b, : len(slots)] = rows[views[-1]][b, slots]
    return indices, scores


def mil_nce_float64(query, own_key, memory, positives=None, query_ids=None, memory_ids=None, same_id="positive",
                    self_positive="keep", temperature=0.07):  # fmt: skip
    """loss [B] and its gradients in float64, straight from the definition, one row at a time."""
    query, own_key, memory = (t.double().requires_grad_() for t in (query, own_key, memory))
    losses = []
    for b in range(len(query)):
        numerator, denominator = set(), set()
        listed = set() if positives is None else {s for s in positives[b].tolist() if s != -1}
        for k in range(len(memory)):
            if memory_ids is not None and memory_ids[k] == -1:
                continue
            same = query_ids is not None and query_ids[b] != -1 and memory_ids[k] == query_ids[b]
            if k in listed or (same and same_id == "positive"):
                numerator.add(k)
            if k in listed or not same or same_id != "ignore":
                denominator.add(k)
        mode = (
            self_positive if isinstance(self_positive, str) else ["keep", "denominator", "drop_both"][self_positive[b]]
        )
        mode = mode if numerator else "keep"
        own = (query[b] @ own_key[b] / temperature)[None]
        logits = memory @ query[b] / temperature
        top = torch.cat([logits[sorted(numerator)], own[: mode == "keep"]])
        bottom = torch.cat([logits[sorted(denominator)], own[: mode != "drop_both"]])
        losses.append(torch.logsumexp(bottom, 0) - torch.logsumexp(top, 0))
    loss = torch.stack(losses)
    gradients = torch.autograd.grad(loss.sum(), (query, own_key, memory), allow_unused=True)
    return loss.detach(), *(g if g is not None else torch.zeros_like(memory) for g in gradients)


# ---- inputs ---------------------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lattice(*shape: int, seed: int = 0) -> torch.Tensor:
    """Multiples of 1/2 in -1..1: scores tie everywhere."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)) / 2


def integers(low: int, high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


def assert_selects(emulated, queries, memory, views, keep, **ids):
    indices, scores = emulated.cascade_select(queries, memory, views, keep, **ids)
    expected_indices, expected_scores = select_by_sorting(queries, memory, views, keep, **ids)
    np.testing.assert_array_equal(indices.numpy(), expected_indices)
    np.testing.assert_array_equal(scores.numpy(), expected_scores)


def assert_loss(emulated, query, own_key, memory, *, tolerance=2e-5, **options):
    """Loss and every gradient against float64, relative to the largest entry of each."""
    out = emulated.mil_nce(query, own_key, memory, **options)
    loss, grad_query, grad_own, grad_memory = mil_nce_float64(query, own_key, memory, **options)
    own = out["own_coefficient"][:, None] * query.float()
    found = {"loss": out["loss"], "query": out["grad_query"], "own_key": own, "memory": out["grad_memory"]}
    truth = {"loss": loss, "query": grad_query, "own_key": grad_own, "memory": grad_memory}
    for name, value in found.items():
        # A coefficient is a difference of probabilities, at most 1 / temperature: its rounding scales with that.
        scale = max(1.0, truth[name].abs().max().item())
        assert (value.double() - truth[name]).abs().max().item() <= tolerance * scale, name
    np.testing.assert_array_equal((out["lse_all"] >= out["lse_positive"] - 1e-4).numpy(), True)


# ---- cascade_select -------------------------------------------------------------------------------------------------


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
        (1, 1, 3, [4, 3]),  # more asked for than there is
        (5, 63, 33, [40, 9]),
        (33, 65, 16, [65, 64]),  # more queries than a small tile, everything kept
        (2, 513, 5, [513, 513]),  # more survivors than are ranked in shared memory
        (65, 130, 130, [50, 1]),
        (3, 1100, 4, [2000, 1100]),
    ],
)
def test_ugly_sizes(emulated, B, K, D, keep):
    queries, memory = normal(2, B, D, seed=3), normal(2, K, D, seed=4)
    assert_selects(emulated, queries, memory, [0, 1][: len(keep)], keep)


def test_on_chip_all_stages_take_two_launches(emulated):
    # More entries than one word a thread marks; room for them in shared memory.
    queries, memory = lattice(1, 2, 3, seed=25), normal(1, 17_000, 3, seed=26)
    before = emulated.launches()
    assert_selects(emulated, queries, memory, [0] * 4, [9000, 4000, 700, 600])
    assert emulated.launches() == before + 2


@pytest.mark.parametrize("route", ["in cache", "refined"])
def test_many_queries_take_several_chunks(emulated, route):
    # A cache for the rows of 33 queries, or of none: chunks are of 128, enough to fill a device.
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
def test_nan_is_never_selected_and_zeros_of_either_sign_tie(emulated):
    queries, memory = torch.zeros(2, 1, 16), torch.zeros(2, 40, 16)
    queries[..., -1], memory[..., -1] = 1e-30, 1e-30
    memory[:, ::2] *= -1  # every score underflows, half of them to -0
    memory[0, 3, 0], memory[1, 5, 0] = torch.nan, torch.nan  # in either view
    assert_selects(emulated, queries, memory, [0, 1], [39, 38])
    memory[1, 9, 0] = torch.nan
    assert_selects(emulated, queries, memory, [0], [40])  # a view not compared is not looked at


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
    views = draw.integers(0, 3, n).tolist()
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
    """The refined route reads a score from the tensor cores where that decides: only near a threshold does it not."""
    emulated.resize(**ROUTES["refined"])
    queries, memory = unit(2, 2, 128, seed=17), unit(2, 600, 128, seed=18)
    assert_selects(emulated, queries, memory, [0, 1, 0], [300, 150, 5])
    memory[1, 40] *= 1e25  # outside the range of the error bound, and then some
    memory[0, 41], memory[0, 42] = torch.inf, 1e-30 * memory[0, 42]
    queries[0, 1] *= 1e20
    assert_selects(emulated, queries, memory, [0, 1, 0], [300, 150, 5])
    emulated.resize()


@pytest.mark.parametrize("scale", [1e-22, 1e-12, 1.0, 1e8])
def test_ties_and_near_ties_across_a_threshold_are_refined_exactly(emulated, scale):
    # Every score is 1/2 up to rounding, of which tensor cores do more: their order is not the canonical one.
    query, noise = unit(1, 96, seed=19).double(), normal(100, 96, seed=20).double()
    memory = query / 2 + noise - (noise @ query.T) * query
    memory = memory.repeat(2, 1).float()[None]  # [1, 200, 96]: each twice
    queries = torch.stack([query.float(), unit(1, 96, seed=21)], dim=1)
    emulated.resize(**ROUTES["refined"])
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


# ---- mil_nce --------------------------------------------------------------------------------------------------------


def loss_inputs(B: int, K: int, D: int, P: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Ids collide, slots are empty, positives repeat, are missing and name empty slots and own ids."""
    positives = integers(-1, K, B, P, seed=seed + 3)
    positives[:, P // 2 :] = positives[:, : P - P // 2]
    return {
        "query": unit(B, D, seed=seed),
        "own_key": unit(B, D, seed=seed + 1),
        "memory": unit(K, D, seed=seed + 2),
        "positives": positives,
        "query_ids": integers(-1, 4, B, seed=seed + 4),
        "memory_ids": integers(-1, 6, K, seed=seed + 5),
    }


@pytest.mark.parametrize("same_id", ["positive", "ignore", "negative"])
@pytest.mark.parametrize("self_positive", ["keep", "denominator", "drop_both", "per row"])
def test_loss_in_every_mode(emulated, same_id, self_positive):
    mode = integers(0, 3, 7, seed=20) if self_positive == "per row" else self_positive
    assert_loss(emulated, **loss_inputs(7, 200, 12, 4), same_id=same_id, self_positive=mode)


@pytest.mark.usefixtures("every_order")
def test_loss_in_every_thread_order(emulated):
    assert_loss(emulated, **loss_inputs(35, 150, 20, 3, seed=30))


@pytest.mark.parametrize(
    ("B", "K", "D", "P"), [(1, 1, 1, 1), (1, 64, 129, 2), (33, 65, 3, 5), (70, 31, 260, 1), (2, 8300, 2, 3)]
)
def test_loss_ugly_sizes(emulated, B, K, D, P):
    assert_loss(emulated, **loss_inputs(B, K, D, P, seed=40))


def test_loss_merges_chunks_of_queries(emulated):
    assert_loss(emulated, **loss_inputs(300, 70, 4, 2, seed=50))


def test_info_nce_without_positives_or_ids(emulated):
    assert_loss(emulated, unit(5, 16, seed=60), unit(5, 16, seed=61), unit(90, 16, seed=62))


# ---- mil_nce on tensor cores: 16-bit features of width 128 and 512 ---------------------------------------------------


def narrow(inputs: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return inputs | {name: inputs[name].to(dtype) for name in ("query", "own_key", "memory")}


@pytest.fixture
def on_tensor_cores(emulated):
    """Fails the test if nothing in it took the route under test."""
    before = emulated.products()
    yield
    assert emulated.products() > before


@pytest.mark.usefixtures("every_order", "on_tensor_cores")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "K", "D"), [(35, 150, 128), (3, 100, 512)])
def test_tensor_core_loss_in_every_thread_order(emulated, B, K, D, dtype):
    assert_loss(emulated, **narrow(loss_inputs(B, K, D, 3, seed=110), dtype))


@pytest.mark.usefixtures("on_tensor_cores")
@pytest.mark.parametrize("same_id", ["positive", "ignore", "negative"])
@pytest.mark.parametrize("self_positive", ["keep", "denominator", "drop_both", "per row"])
def test_tensor_core_loss_in_every_mode(emulated, same_id, self_positive):
    mode = integers(0, 3, 7, seed=20) if self_positive == "per row" else self_positive
    assert_loss(emulated, **narrow(loss_inputs(7, 140, 128, 4, seed=120)), same_id=same_id, self_positive=mode)


@pytest.mark.usefixtures("on_tensor_cores")
@pytest.mark.parametrize(("B", "K", "D"), [(1, 1, 128), (1, 31, 512), (66, 65, 128), (1, 8200, 128), (2, 300, 512)])
def test_tensor_core_loss_ugly_sizes(emulated, B, K, D):
    assert_loss(emulated, **narrow(loss_inputs(B, K, D, 2, seed=130)))


@pytest.mark.usefixtures("on_tensor_cores")
def test_tensor_core_loss_merges_chunks_of_queries(emulated):
    assert_loss(emulated, **narrow(loss_inputs(260, 40, 128, 2, seed=140)))


@pytest.mark.usefixtures("on_tensor_cores")
def test_tensor_core_info_nce_without_positives_or_ids(emulated):
    assert_loss(emulated, *(unit(n, 128, seed=150 + n).half() for n in (5, 5, 90)))


@pytest.mark.usefixtures("on_tensor_cores")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_near_zero_keeps_its_gradient(emulated, dtype):
    # One entry holds nearly all of both sums: what one 16-bit term of its weight rounds away exceeds the gradient.
    inputs = narrow(loss_inputs(4, 80, 128, 1, seed=160), dtype)
    inputs["memory_ids"], inputs["positives"] = torch.arange(80), torch.arange(4)[:, None] + 70
    inputs["query"] = inputs["memory"][70:74].contiguous()
    out = emulated.mil_nce(**inputs, self_positive="drop_both", temperature=0.1)
    loss, grad_query, *_ = mil_nce_float64(**inputs, self_positive="drop_both", temperature=0.1)
    assert loss.max() < 0.05
    assert (out["grad_query"].double() - grad_query).abs().max() < 1e-3 * grad_query.abs().max()


@pytest.mark.usefixtures("on_tensor_cores")
def test_many_small_half_precision_weights_add_up(emulated):
    # Weights near 2^-24 of the greatest: the least numbers of float16, were they not scaled.
    memory = torch.zeros(4000, 128)
    memory[0, 0], memory[1:, 1] = 1, 1
    query = torch.zeros(1, 128)
    query[0, 0], query[0, 1] = 1.7, 0.5
    inputs = [t.half() for t in (query, memory[:1], memory)]
    found, truth = emulated.mil_nce(*inputs)["grad_query"][0, 1], mil_nce_float64(*inputs)[1][0, 1]
    assert truth > 5e-4 and abs(found - truth) < 1e-4 * truth


@pytest.mark.usefixtures("on_tensor_cores")
def test_a_cold_temperature_on_tensor_cores(emulated):
    inputs = narrow(loss_inputs(5, 100, 128, 3, seed=170))
    assert_loss(emulated, **inputs, temperature=0.01, tolerance=5e-5)
    inputs["query"] = inputs["query"] * 30
    assert_loss(emulated, **inputs, temperature=0.01, tolerance=2e-3)


@pytest.mark.usefixtures("on_tensor_cores")
def test_empty_slots_of_any_content_on_tensor_cores(emulated):
    inputs = narrow(loss_inputs(4, 140, 128, 2, seed=180))
    empty = inputs["memory_ids"] == -1
    inputs["memory"][empty] = torch.nan
    found = emulated.mil_nce(**inputs)
    inputs["memory"][empty] = 0
    expected = emulated.mil_nce(**inputs)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), value.numpy(), name)
    inputs["memory"][3] = torch.nan  # a live one
    inputs["memory_ids"][3] = 99
    assert emulated.mil_nce(**inputs)["loss"].isnan().all()


@pytest.mark.usefixtures("on_tensor_cores")
@pytest.mark.parametrize("D", [128, 512])
def test_tensor_core_loss_of_a_row_does_not_depend_on_its_batch(emulated, D):
    inputs = narrow(loss_inputs(40, 200, D, 3, seed=190))
    together = emulated.mil_nce(**inputs)
    rows = {name: inputs[name][33:34].contiguous() for name in ("query", "own_key", "positives", "query_ids")}
    alone = emulated.mil_nce(**(inputs | rows))
    for name in ("loss", "grad_query", "own_coefficient", "lse_all", "lse_positive"):
        np.testing.assert_array_equal(alone[name].numpy(), together[name][33:34].numpy())


def test_what_tensor_cores_cannot_take_goes_the_general_way(emulated):
    inputs = narrow(loss_inputs(3, 70, 128, 2, seed=200))
    before = emulated.products()
    memory = torch.zeros(70 * 128 + 1, dtype=torch.bfloat16)[1:].view(70, 128).copy_(inputs["memory"])
    assert_loss(emulated, **(inputs | {"memory": memory}))  # rows off a 16-byte boundary
    emulated.resize(shared_limit=99 << 10)
    assert_loss(emulated, **narrow(loss_inputs(3, 70, 512, 2, seed=210)))  # a device with less shared memory
    emulated.resize()
    assert emulated.products() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_narrow_inputs_accumulates_in_float32(emulated, dtype):
    inputs = loss_inputs(6, 130, 24, 3, seed=70)
    inputs |= {name: inputs[name].to(dtype) for name in ("query", "own_key", "memory")}
    assert_loss(emulated, **inputs)


def test_a_cold_temperature_and_long_vectors_do_not_overflow(emulated):
    inputs = loss_inputs(5, 100, 8, 3, seed=80)
    assert_loss(emulated, **inputs, temperature=0.01, tolerance=5e-5)
    inputs["query"] = inputs["query"] * 30  # logits of a few thousand
    assert_loss(emulated, **inputs, temperature=0.01, tolerance=2e-3)


def test_an_empty_memory_loses_nothing_whatever_it_holds(emulated):
    inputs = loss_inputs(4, 66, 5, 2, seed=90)
    inputs["memory_ids"].fill_(-1)
    inputs["memory"].fill_(torch.nan)
    for self_positive in ("keep", "denominator", "drop_both"):
        out = emulated.mil_nce(**inputs, self_positive=self_positive)
        for name in ("loss", "grad_query", "own_coefficient", "grad_memory"):
            assert (out[name] == 0).all(), name


def test_loss_of_a_row_does_not_depend_on_its_batch(emulated):
    inputs = loss_inputs(40, 300, 16, 3, seed=100)
    together = emulated.mil_nce(**inputs)
    rows = {name: inputs[name][11:12] for name in ("query", "own_key", "positives", "query_ids")}
    alone = emulated.mil_nce(**(inputs | rows))
    for name in ("loss", "grad_query", "own_coefficient", "lse_all", "lse_positive"):
        np.testing.assert_array_equal(alone[name].numpy(), together[name][11:12].numpy())


def test_a_positive_outside_the_memory_stops_the_device():
    program = (
        "import torch; from support.cuda_emulation.device import *\n"
        "x = torch.ones(1, 2)\n"
        "Device(build()).mil_nce(x, x, torch.ones(3, 2), torch.tensor([[3]]))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY / "tests", capture_output=True, text=True)
    assert result.returncode < 0 and "a slot outside the memory" in result.stderr
