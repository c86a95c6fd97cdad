"""Slow references of cascade_select and mil_nce from their definitions, difficult inputs, and the routes of the CUDA
kernels."""

from __future__ import annotations

import numpy as np
import torch

ROUTES = {  # the limits of an emulated device that select a route of cascade_select
    "on chip": {},
    "in cache": {"shared_limit": 0, "cache_size": 40 << 20},
    "streamed": {"shared_limit": 0, "cache_size": 0},
}
# Shared memory that holds the gathered entries of a long row, but not the row.
LISTS_IN_SHARED_MEMORY = {"shared_limit": 128 << 10, "cache_size": 0}


def fma_scores(queries: torch.Tensor, memory: torch.Tensor) -> np.ndarray:
    """Returns the canonical score [B, K]: a float32 chain of fused multiply-adds over d from +0, every step rounded
    once.

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
    """Computes cascade_select by full sorts in (score descending, slot ascending) over the canonical scores."""
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


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lattice(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draws multiples of 1/2 in -1..1, so that many scores are equal."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)) / 2


def integers(low: int, high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


def loss_inputs(B: int, K: int, D: int, P: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Draws equal ids, empty slots, and positives that repeat, are missing, or are empty slots or slots with the
    query's id.
    """
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


def single_key_inputs(B: int, K: int, D: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Draws one key for each query that has its id, and two empty slots, at different places of tiles of 64 keys that
    have no other such key; K at least 64 (B + 2)."""
    slots = torch.arange(B + 2) * 64 + torch.arange(B + 2) * 13 % 64
    memory, memory_ids = unit(K, D, seed=2), torch.zeros(K, dtype=torch.int64)
    memory_ids[slots] = torch.cat([torch.arange(B) + 1, torch.tensor([-1, -1])]).roll(1)
    memory[memory_ids == -1] *= 30
    query, own_key = unit(B, D, seed=0).to(dtype), unit(B, D, seed=1).to(dtype)
    ids = {"query_ids": torch.arange(B) + 1, "memory_ids": memory_ids}
    return {"query": query, "own_key": own_key, "memory": memory.to(dtype), **ids}


def assert_loss(emulated, query, own_key, memory, *, tolerance=2e-5, **options):
    """Compares the emulated loss and every gradient with float64, relative to the largest entry of each."""
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


# B, K, D of float32 calls whose loss one multiprocessor computes by larger tiles (csrc/cuda/mil_nce/wide_scan.cuh):
# parts of a tile of queries and of keys, a single panel of features, and an odd number with a part of 128 columns.
LARGER_TILES = [(33, 8193, 32), (97, 8300, 64), (34, 8256, 160)]


def assert_same_loss_by_larger_tiles(device, **given) -> None:
    """Compares the loss by larger tiles with that by the smaller ones, bit for bit."""
    device.resize(processors=1)
    found = device.mil_nce(**given, backward=False)
    device.resize(processors=1, shared_limit=99 << 10)  # too little for two blocks with larger tiles
    expected = device.mil_nce(**given, backward=False)
    device.resize()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), value.numpy(), name)


def assert_cpu_selection(device, queries, memory, views, keep, **options) -> None:
    """Compares cascade_select of an emulated device with that of the CPU kernel, bit for bit."""
    from cpr_fast.ops import cascade_select

    found = device.cascade_select(queries, memory, views, keep, **options)
    expected = cascade_select(queries, memory, views, keep, **options)
    torch.testing.assert_close(list(found), list(expected), rtol=0, atol=0)


def random_ids(B: int, K: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns ids of queries and memory, some of them equal, -1 among them."""
    return {"query_ids": integers(-1, 5, B, seed=seed), "memory_ids": integers(-1, 9, K, seed=seed + 1)}
