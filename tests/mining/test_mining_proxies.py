"""Compares survivor rates, view agreement, mutual neighbours and age with loops over single queries in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cpr_fast.mining.proxies import mined_age, mutual_neighbours, view_agreement
from cpr_fast.mining.quality import MiningQuality, hub_share, hubness
from cpr_fast.mining.stages import stage_keep, stage_views
from cpr_fast.mining.survivors import survivor_rates
from cpr_fast.ops import cascade_select


def problem(*, queries=9, slots=53, width=6, seed=0, lattice=True):
    """Features with ties (on a lattice), empty slots, siblings and unknown labels; V = 2."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.integers(-2, 3, shape) if lattice else rng.standard_normal(shape)  # noqa: E731
    memory_ids, query_ids = rng.integers(0, 15, slots), rng.integers(0, 15, queries)
    memory_ids[rng.random(slots) < 0.2] = -1
    query_ids[0] = -1
    memory_labels, query_labels = memory_ids % 4, query_ids % 4
    memory_labels[rng.random(slots) < 0.1] = -1
    query_labels[-1] = -1
    arrays = {
        "queries": draw(2, queries, width).astype(np.float32), "memory": draw(2, slots, width).astype(np.float32),
        "query_ids": query_ids, "memory_ids": memory_ids, "query_labels": query_labels, "memory_labels": memory_labels,
    }  # fmt: skip
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}


def allowed_slots(p, query):
    own = int(p["query_ids"][query])
    return [k for k, i in enumerate(p["memory_ids"].tolist()) if i != -1 and (i != own or own == -1)]


def scores_of(p, view, vector):
    return p["memory"][view].double().numpy() @ vector.double().numpy()


def best(slots, scores, count):
    return sorted(slots, key=lambda k: (-scores[k], k))[:count]


def same(measured, expected):
    assert measured.dtype == torch.float32
    assert measured.tolist() == pytest.approx(expected, nan_ok=True, abs=1e-6)


def ratio(part, whole):
    return part / whole if whole else math.nan


@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_survivors_equal_their_definition(stages, seed):
    p = problem(seed=seed)
    views, keep = stage_views(stages), stage_keep(stages, 53, 0.6, 4)
    ids = {name: p[name] for name in ("query_ids", "memory_ids")}
    mined, _ = cascade_select(p["queries"], p["memory"], views, keep, **ids)
    rates = survivor_rates(views=views, keep=keep, mined=mined, **p)
    expected = {name: [] for name in rates}
    for q in range(9):
        label, left = int(p["query_labels"][q]), allowed_slots(p, q)
        known = [k for k in left if label >= 0 and p["memory_labels"][k] >= 0]
        right = [k for k in known if p["memory_labels"][k] == label]
        expected["pmr_chance"].append(ratio(len(right), len(known)))
        for s, (view, count) in enumerate(zip(views, keep, strict=True), 1):
            left = best(left, scores_of(p, view, p["queries"][view, q]), count)
            found = len(set(left) & set(right))
            expected[f"survivor_precision_{s}"].append(ratio(found, len(set(left) & set(known))))
            expected[f"survivor_recall_{s}"].append(ratio(found, len(right)))
    for name, rate in rates.items():
        same(rate, expected[name])


@pytest.mark.parametrize(("top_k", "lattice"), [(1, True), (4, True), (60, True), (4, False)])
def test_agreement_and_mutual_neighbours_equal_their_definitions(top_k, lattice):
    p = problem(seed=top_k, lattice=lattice)
    ids = {name: p[name] for name in ("query_ids", "memory_ids")}
    mined, _ = cascade_select(p["queries"], p["memory"], stage_views(3), stage_keep(3, 53, 0.6, top_k), **ids)
    agreement, mutual = [], []
    for q in range(9):
        allowed = allowed_slots(p, q)
        entries = [k for k in mined[q].tolist() if k >= 0]
        scores = scores_of(p, 0, p["queries"][0, q])
        agreement.append(np.mean([1 - sum(scores[allowed] > scores[k]) / len(allowed) for k in entries]))
        hits = []
        for k in entries:
            others = [j for j, i in enumerate(p["memory_ids"].tolist()) if i not in (-1, int(p["memory_ids"][k]))]
            of_entry = scores_of(p, 0, p["memory"][0, k])
            nearest = best(others, of_entry, top_k)
            hits.append(len(nearest) < top_k or scores[k] >= of_entry[nearest[-1]])
        mutual.append(np.mean(hits))
    arguments = (p["queries"][0], p["memory"][0], mined)
    same(view_agreement(*arguments, **ids), agreement)
    same(mutual_neighbours(*arguments, **ids), mutual)


def test_agreement_is_one_for_the_nearest_and_a_half_by_chance():
    generator = torch.Generator().manual_seed(0)
    queries, memory = torch.randn(64, 16, generator=generator), torch.randn(400, 16, generator=generator)
    ids = {"query_ids": torch.full((64,), -1), "memory_ids": torch.arange(400)}
    nearest = (queries @ memory.T).argmax(1, keepdim=True)
    assert view_agreement(queries, memory, nearest, **ids).tolist() == [1] * 64
    random = torch.randint(0, 400, (64, 20), generator=generator)
    assert view_agreement(queries, memory, random, **ids).mean().item() == pytest.approx(0.5, abs=0.03)


def test_age_is_the_mean_over_what_was_mined():
    mined = torch.tensor([[0, 2, -1], [-1, -1, -1], [1, 1, 1]])
    same(mined_age(mined, torch.tensor([4, 9, 7]), step=10), [4.5, math.nan, 1])


def test_no_measure_waits_for_the_device():
    """Fake tensors hold no values: operations that copy a value to the host, or whose shape depends on data, raise."""
    with FakeTensorMode():
        queries, memory = torch.empty(2, 4, 8), torch.empty(2, 30, 8)
        query_ids, memory_ids = torch.empty(4, dtype=torch.int64), torch.empty(30, dtype=torch.int64)
        ids = {"query_ids": query_ids, "memory_ids": memory_ids}
        mined, _ = cascade_select(queries, memory, [1, 0, 1], [15, 8, 5], **ids)
        rates = survivor_rates(
            queries, memory, [1, 0, 1], [15, 8, 5], mined, **ids, query_labels=query_ids, memory_labels=memory_ids
        )
        rates["view_agreement"] = view_agreement(queries[0], memory[0], mined, **ids)
        rates["mutual_neighbours"] = mutual_neighbours(queries[0], memory[0], mined, **ids)
        rates["mined_age_steps"] = mined_age(mined, memory_ids, 7)
        assert all(rate.shape == (4,) for rate in rates.values())
        quality = MiningQuality.__new__(
            MiningQuality
        )  # its constructor may synchronise, because it runs once per cycle
        quality.labels, quality.names = memory_ids, ("pmr", "mining_r1", *rates)
        quality.top_k, quality.num_classes = 5, 3
        quality._units = dict.fromkeys(("source", "video"), (memory_ids, query_ids))
        quality.reset()
        assert quality.update(mined, query_ids, rates)["pmr"].shape == ()
        assert hubness(quality.counts).shape == hub_share(quality.counts).shape == ()
