"""cascade_select and its peers: the published schedule of 7 stages to the top 5, two views, D = 128.

Letters: B queries, K memory entries, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from forms import Unavailable, compiled, graphed, in_variant, need_cuda, peer

from cpr_fast.ops import cascade_select, cascade_select_ref

OP, DIRECTIONS = "cascade_select", ("forward",)
D, STAGES, RATIO, TOP_K = 128, 7, 0.5, 5
VIEWS = [(STAGES - 1 - s) % 2 for s in range(STAGES)]


@dataclass(frozen=True)
class Inputs:
    queries: Tensor  # [2, B, D]
    memory: Tensor  # [2, K, D]
    keep: Sequence[int]

    @property
    def all(self) -> tuple:
        return self.queries, self.memory, VIEWS, self.keep


def make_inputs(B: int, K: int, device: str, direction: str, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    queries, memory = (torch.randn(2, rows, D, generator=generator, device=device) for rows in (B, K))
    queries, memory = (normalize(features, dim=2).to(dtype) for features in (queries, memory))
    return Inputs(queries, memory, [max(TOP_K, int(K * RATIO**s)) for s in range(1, STAGES)] + [TOP_K])


def work(B: int, K: int, direction: str) -> tuple[float, float]:
    """Returns the operations and the moved elements that every form needs: scores of both views, one read."""
    return 2 * 2 * B * K * D, 2 * (B + K) * D


def error(inputs: Inputs, result: tuple | Tensor) -> float:
    """Returns the share of the entries selected for the first queries that the float64 reference does not select."""
    found = result[0] if isinstance(result, tuple) else result
    rows = max(1, min(len(found), 2**20 // inputs.memory.shape[1]))
    expected, _ = cascade_select_ref(inputs.queries[:, :rows].contiguous(), *inputs.all[1:])
    return 1 - (found[:rows, :, None] == expected[:, None, :]).any(2).double().mean().item()


# ---- in plain torch ------------------------------------------------------------------------------------------
def gathered(queries: Tensor, memory: Tensor, views: Sequence[int], keep: Sequence[int]) -> Tensor:
    """Computes topk(sorted=False) on gathered sets that shrink: the best eager form."""
    scores = [queries[v] @ memory[v].T for v in range(2)]
    slots = None
    for view, count in zip(views, keep, strict=True):
        row = scores[view] if slots is None else scores[view].gather(1, slots)
        best = row.topk(count, dim=1, sorted=False).indices
        slots = best if slots is None else slots.gather(1, best)
    return slots


def masked(queries: Tensor, memory: Tensor, views: Sequence[int], keep: Sequence[int]) -> Tensor:
    """Computes topk on whole rows; dropped entries are masked to -inf."""
    scores = [queries[v] @ memory[v].T for v in range(2)]
    dropped = torch.zeros_like(scores[0], dtype=torch.bool)
    for view, count in zip(views, keep, strict=True):
        best = scores[view].masked_fill(dropped, -torch.inf).topk(count, dim=1).indices
        dropped = torch.ones_like(dropped).scatter_(1, best, False)
    return best


def after_first(slots: Tensor, queries: Tensor, memory: Tensor, views: Sequence[int], keep: Sequence[int]) -> Tensor:
    """Computes stages 2 to n as in `gathered`, on the slots [B, keep[0]] that another library's search found."""
    scores = [queries[v] @ memory[v].T for v in range(2)]
    for view, count in zip(views[1:], keep[1:], strict=True):
        slots = slots.gather(1, scores[view].gather(1, slots).topk(count, dim=1, sorted=False).indices)
    return slots


def two_gemms(queries: Tensor, memory: Tensor, *_) -> tuple[Tensor, ...]:
    """Computes only the scores, by torch's matrix product, without a selection."""
    return tuple(queries[v] @ memory[v].T for v in range(2))


# ---- forms: inputs -> call -----------------------------------------------------------------------------------
def variant(name: str) -> Callable:
    def prepare(inputs: Inputs) -> Callable:
        pairs = inputs.queries.shape[1] * inputs.memory.shape[1]
        return in_variant(name, lambda: cascade_select(*inputs.all), inputs.queries.device, pairs)

    return prepare


def approximate(inputs: Inputs) -> Callable:
    need_cuda(inputs.queries.device, 'precision="bf16" (exact on the CPU)')
    return lambda: cascade_select(*inputs.all, precision="bf16")


def faiss(inputs: Inputs) -> Callable:
    library = peer("faiss", "faiss-cpu")
    if inputs.queries.dtype != torch.float32:
        raise Unavailable("supports float32 only")
    if inputs.queries.is_cuda:
        peer("faiss.contrib.torch_utils", "faiss-gpu-cu12")
        if inputs.keep[0] > 2048:
            raise Unavailable(f"its search on CUDA keeps 2048 entries at most, the first stage {inputs.keep[0]}")
        resources = library.StandardGpuResources()

        def search(queries, memory):
            metric = library.METRIC_INNER_PRODUCT
            return library.knn_gpu(resources, queries, memory, inputs.keep[0], metric=metric)[1]
    else:
        library.omp_set_num_threads(1)

        def search(queries, memory):
            metric = library.METRIC_INNER_PRODUCT
            return torch.from_numpy(library.knn(queries.numpy(), memory.numpy(), inputs.keep[0], metric=metric)[1])

    view = VIEWS[0]
    return lambda: after_first(search(inputs.queries[view], inputs.memory[view]), *inputs.all)


def cuvs(inputs: Inputs) -> Callable:
    need_cuda(inputs.queries.device, "cuVS")
    library = peer("cuvs.neighbors.brute_force", "cuvs-cu13")
    if inputs.queries.dtype != torch.float32:
        raise Unavailable("supports float32 and float16 only")
    view, B = VIEWS[0], inputs.queries.shape[1]
    index = library.build(inputs.memory[view], metric="inner_product")
    slots = torch.empty(B, inputs.keep[0], dtype=torch.int64, device="cuda")
    scores = torch.empty(B, inputs.keep[0], device="cuda")

    def call():
        library.search(index, inputs.queries[view], inputs.keep[0], neighbors=slots, distances=scores)
        return after_first(slots, *inputs.all)

    return call


def compiled_gathered(inputs: Inputs) -> Callable:
    form = compiled(gathered)
    return lambda: form(*inputs.all)


NO_ERROR = ("two GEMMs alone",)
FORMS: dict[str, Callable[[Inputs], Callable]] = {
    "cpr_fast": lambda inputs: lambda: cascade_select(*inputs.all),
    "cpr_fast again": lambda inputs: lambda: cascade_select(*inputs.all),
    "cpr_fast avx2": variant("avx2"),
    "cpr_fast portable": variant("portable"),
    "cpr_fast bf16": approximate,
    "cpr_fast graphed": lambda inputs: graphed(lambda: cascade_select(*inputs.all), inputs.queries.device),
    "two GEMMs alone": lambda inputs: lambda: two_gemms(*inputs.all),
    "best eager": lambda inputs: lambda: gathered(*inputs.all),
    "best eager graphed": lambda inputs: graphed(lambda: gathered(*inputs.all), inputs.queries.device),
    "masked top-k": lambda inputs: lambda: masked(*inputs.all),
    "torch.compile": compiled_gathered,
    "FAISS, then eager": faiss,
    "cuVS, then eager": cuvs,
}
