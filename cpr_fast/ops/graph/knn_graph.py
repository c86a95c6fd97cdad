"""The exact k-nearest-neighbour graph of a set of features.

Letters in shapes: N entries, D feature width, k neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from ..binding import checks
from ..cascade_select import cascade_select
from ..partial.cascade import NO_KEY, keys_of, scores_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EMPTY = NO_KEY * 2**32  # a word without an entry
_SLOTS = 2**32 - 1
_PANEL_BYTES = 2**18  # of float32 features that are compared at once: half of the cache of a core
_LEAST_ROWS, _MOST_ROWS = 64, 512
_MERGED = 2**16  # lists that are merged at once


def knn_graph(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k entries with the highest dot product for every entry of a set, without itself, best first.

    The result is that of `cascade_select(features[None], features[None], [0], [k], query_ids=slots, memory_ids=slots)`
    with `slots = torch.arange(N)`, bit for bit, on all devices and for every number of threads. On the CPU every pair
    is scored once for both of its entries, so that it takes about half of the time, and 8 N k bytes beside the result.
    L2-normalised features give cosines.

    Args:
        features: [N, D] float32, bfloat16 or float16, N < 2**31 - 1.
        k: the number of neighbours, at least 1. May exceed N - 1.

    Returns:
        indices [N, k] int64 and scores [N, k] float32, without gradients, in the order (score descending, index
        ascending); -1 and -inf where fewer than k other entries have a score. NaN is no score.

    Raises:
        TypeError, ValueError: the message names the argument. NotImplementedError: no kernel for the device.

    Example:
        >>> features = torch.nn.functional.normalize(torch.randn(1000, 128), dim=1)
        >>> indices, scores = knn_graph(features, 10)
        >>> indices.shape, scores.shape
        (torch.Size([1000, 10]), torch.Size([1000, 10]))
    """
    graph = KnnGraph(features, k)
    while graph.done < graph.end:
        graph.step()
    return graph.result()


def knn_graph_ref(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Computes `knn_graph` in plain PyTorch, with float64 scores and a stable sort: slow, O(N^2) memory."""
    scores = features.double() @ features.double().T  # [N, N]
    scores.fill_diagonal_(torch.nan)
    order = scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf)
    order = order.masked_fill(scores.isneginf(), torch.finfo(torch.float64).min)  # above NaN, which is no score
    best = order.argsort(dim=1, descending=True, stable=True)[:, :k]
    found = scores.gather(1, best)
    padding = (0, k - best.shape[1])
    indices = torch.nn.functional.pad(best.where(~found.isnan(), -1), padding, value=-1)
    found = found.where(~found.isnan(), -torch.inf).float()
    return indices, torch.nn.functional.pad(found, padding, value=-torch.inf)


class KnnGraph:
    """`knn_graph` in steps. The state, `done` and `best`, can be stored after a step and given to a later object with
    the same features on the same kind of device, which continues from there. A range of rows, from `done` to `end`, is
    a part of the graph, and `merge` joins parts.

    Args:
        features, k: as for `knn_graph`. The features are not copied where they are contiguous, and must not change.
        best: [N, k] int64 contiguous, the lists of an earlier object, which are changed in place; None begins.
        done: the number of the first rows that were compared with all later ones when `best` was stored.
        end: the row before which the steps stop; all rows by default.

    Attributes:
        best: [N, k] int64: the key of a score (see `cascade_keys`) in the upper half of a word, 2**32 - 1 - index in
            the lower one, in descending order; -2**63 where there is no entry.
        rows: the number of rows of a step.

    Raises:
        As `knn_graph`.
    """

    def __init__(
        self, features: Tensor, k: int, *, best: Tensor | None = None, done: int = 0, end: int | None = None
    ) -> None:
        checks.check_tensor("features", features, _DTYPES, "[N, D]", 2)
        checks.check_device("features", features, "cascade_select")
        size, width = features.shape
        if size >= 2**31 - 1:
            raise ValueError(f"features: expected fewer than {2**31 - 1} entries, got {size}")
        k = checks.count("k", k)
        self.features = features.detach().contiguous()
        if best is None:
            best = torch.full((size, k), _EMPTY, dtype=torch.int64, device=features.device)
        checks.check_int64("best", best, (size, k), features, "features")
        if not best.is_contiguous():
            raise ValueError("best: expected contiguous memory, because it is changed in place")
        if not 0 <= checks.integer("done", done) <= size:
            raise ValueError(f"done: expected 0..{size}, got {done}")
        if not done <= checks.integer("end", size if end is None else end) <= size:
            raise ValueError(f"end: expected {done}..{size}, got {end}")
        self.best, self.done, self.end = best, done, size if end is None else end
        self.rows = max(_LEAST_ROWS, min(_MOST_ROWS, _PANEL_BYTES // (4 * width) // _LEAST_ROWS * _LEAST_ROWS))

    @property
    def share(self) -> float:
        """The share of all pairs that the rows before `done` are part of, 0..1."""
        left = len(self.features) - self.done
        return 1 - left * (left - 1) / max(1, len(self.features) * (len(self.features) - 1))

    @torch.no_grad()
    def step(self) -> None:
        """Compares the next `rows` rows before `end` with all rows after them. Does nothing if all are compared."""
        end = min(self.done + self.rows, self.end)
        if self.done < end:
            if self.features.device.type == "cpu":
                ops.knn_graph_rows.default(self.features, self.best, self.done, end)
            else:
                self._select(end)
        self.done = end

    def _select(self, end: int) -> None:
        """Compares the next rows with all rows, where pairs are not shared."""
        slots = torch.arange(len(self.features), device=self.features.device)
        indices, scores = cascade_select(
            self.features[None, self.done : end], self.features[None], [0], [self.best.shape[1]],
            query_ids=slots[self.done : end], memory_ids=slots,
        )  # fmt: skip
        keys = keys_of(scores).long()
        self.best[self.done : end] = torch.where(indices < 0, _EMPTY, keys * 2**32 + (_SLOTS - indices))

    def merge(self, best: Tensor) -> None:
        """Adds lists [M, k] int64 of the last M entries, `best` of another part: one whose rows are not among those
        that were compared here."""
        size, k = self.best.shape
        checks.check_int64("best", best, (min(len(best), size), k), self.features, "features")
        for own, other in zip(self.best[size - len(best) :].split(_MERGED), best.split(_MERGED)):
            own.copy_(torch.cat([own, other], 1).topk(k, 1).values)

    def result(self) -> tuple[Tensor, Tensor]:
        """Returns indices [N, k] int64 and scores [N, k] float32 of what was compared; see `knn_graph`."""
        indices = (_SLOTS - (self.best & _SLOTS)).masked_fill(self.best == _EMPTY, -1)
        return indices, scores_of((self.best >> 32).int())


@torch.library.register_fake(add_op_namespace_prefix("knn_graph_rows"))
def _fake_rows(features, best, begin, end):
    return None
