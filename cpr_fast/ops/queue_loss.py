"""A module that holds a queue of keys and computes the loss over it [MoCo, He et al. 2020; CPR, arXiv 2201.07989].

Letters in shapes: V views, B clips, K queue entries, D feature width, P positives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .binding import checks
from .cascade_select import cascade_select
from .mil_nce import SELF_POSITIVE, mil_nce

_UNKNOWN = -2  # the id of a key without a source: equal to no query's, and not that of an empty slot


class QueueLoss(nn.Module):
    """The MIL-NCE loss of queries against a queue of the newest keys, from which positives are mined.

    One call computes the loss and, in training mode, enqueues the keys. The queue, its ids and its position are
    buffers: they move with `.to()` and are part of the `state_dict`. Under DistributedDataParallel each process has
    a separate queue; to share one queue, gather keys and ids over the processes before the call.

    The queue starts empty. The loss of the first call is therefore 0, without a gradient, and a cascade in a queue of a
    few entries mines most of them. Fill the queue first: call `enqueue` with keys, or train with a `QueueLoss` without
    a cascade, until `(memory_ids != -1).all()`.

    Args:
        size: K, the number of entries of the queue; at least the batch size.
        feature_dim: D.
        num_views: V, the views of each clip, such as RGB and flow.
        views, keep: the cascade, in the form of `cascade_select`; with None nothing is mined, and the loss is InfoNCE
            (MoCo).
        temperature: a positive number.
        learn_temperature: learn the temperature; the parameter is its logarithm, as in CLIP.
        same_id, self_positive: see `mil_nce`; same_id says how entries of the same source are treated.

    Attributes:
        memory: [V, K, D] float32, zero where empty.
        memory_ids: [K] int64, -1 where empty, -2 for a key whose source is not known.
        position: [] int64, the slot that is written next.

    Example:
        >>> criterion = QueueLoss(4096, 128, num_views=2, views=[1, 0, 1], keep=[2048, 1024, 5])
        >>> query, key = (torch.nn.functional.normalize(torch.randn(2, 8, 128), dim=2) for _ in range(2))
        >>> criterion(query.requires_grad_(), key, ids=torch.arange(8)).backward()
    """

    def __init__(
        self,
        size: int,
        feature_dim: int,
        *,
        num_views: int = 1,
        views: Sequence[int] | None = None,
        keep: Sequence[int] | None = None,
        temperature: float = 0.07,
        learn_temperature: bool = False,
        same_id: str = "ignore",
        self_positive: str = "keep",
    ) -> None:
        super().__init__()
        counts = {"size": size, "feature_dim": feature_dim, "num_views": num_views}
        size, feature_dim, num_views = (checks.count(name, value) for name, value in counts.items())
        if (views is None) != (keep is None):
            raise ValueError("views, keep: expected both, or neither for InfoNCE without mining")
        self.views = None if views is None else checks.integers("views", views)
        self.keep = None if keep is None else checks.integers("keep", keep)
        temperature = checks.positive("temperature", temperature)
        if not isinstance(learn_temperature, bool):
            raise TypeError(f"learn_temperature: expected a bool, got {checks.describe(learn_temperature)}")
        checks.check_choice("self_positive", self_positive, SELF_POSITIVE)
        self.same_id, self.self_positive = same_id, self_positive
        self.fixed_temperature = None if learn_temperature else temperature
        if learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        try:
            memory = torch.zeros(num_views, size, feature_dim)
        except RuntimeError:  # the size is more than int64 counts, or than the machine has
            shape = [num_views, size, feature_dim]
            raise MemoryError(f"size, feature_dim, num_views: out of memory for a queue {shape} of float32") from None
        self.register_buffer("memory", memory)
        self.register_buffer("memory_ids", torch.full((size,), -1))
        self.register_buffer("position", torch.tensor(0))
        self._try_settings()

    def _try_settings(self) -> None:
        """Raises the errors of the operators for `views`, `keep`, `same_id` and `self_positive`, on tensors without
        values: otherwise the first batch would raise them."""
        memory = torch.empty_like(self.memory, device="meta")
        row = memory[:, :1]
        if self.views is not None:
            cascade_select(row, memory, self.views, self.keep)
        mil_nce(row[0], row[0], memory[0], same_id=self.same_id, self_positive=self.self_positive)

    @property
    def temperature(self) -> float | Tensor:
        """The temperature: a float, or a differentiable [] tensor if it is learned."""
        return self.log_temperature.exp() if self.fixed_temperature is None else self.fixed_temperature

    def forward(self, query: Tensor, key: Tensor, ids: Tensor | None = None) -> Tensor:
        """Returns the mean loss over views and clips, [] float32; in training mode, enqueues `key` afterwards.

        Args:
            query: [V, B, D], or [B, D] for one view: the features that receive a gradient.
            key: of the same shape: the features of the other augmentation, from the momentum encoder. Detached.
            ids: [B] int64, the source video of each clip, -1 where it is not known; None where no two clips share a
                source.
        """
        query, key = self._with_views("query", query), self._with_views("key", key).detach()
        checks.check_int64("ids", ids, (query.shape[1],), query, "query")
        if query.shape != key.shape:
            raise ValueError(f"key: expected the shape of query, {list(query.shape)}, got {list(key.shape)}")
        positives = self.mine(key, ids)
        losses = [
            mil_nce(
                query[v], key[v], self.memory[v], positives, query_ids=ids, memory_ids=self.memory_ids,
                same_id=self.same_id, self_positive=self.self_positive, temperature=self.temperature,
            )
            for v in range(len(self.memory))
        ]  # fmt: skip
        if self.training:
            self.enqueue(key, ids)
        return torch.stack(losses).mean()

    @torch.no_grad()
    def mine(self, key: Tensor, ids: Tensor | None = None) -> Tensor | None:
        """Returns the slots [B, P] that the cascade selects for each key, -1 for none; None without a cascade."""
        if self.views is None:
            return None
        key = self._with_views("key", key)
        if self.memory.dtype == torch.float64:
            raise TypeError("memory: expected float32, bfloat16 or float16 for mining, got torch.float64; convert the "
                            "module by .float()")  # fmt: skip
        checks.check_int64("ids", ids, (key.shape[1],), key, "key")
        slots, _ = cascade_select(key, self.memory, self.views, self.keep, query_ids=ids, memory_ids=self.memory_ids)
        return slots

    @torch.no_grad()
    def enqueue(self, key: Tensor, ids: Tensor | None = None) -> None:
        """Writes keys [V, B, D] over the oldest entries. Does not wait for the device."""
        key = self._with_views("key", key)
        batch, size = key.shape[1], self.memory.shape[1]
        if batch > size:
            raise ValueError(f"key: expected at most size = {size} keys at once, got {batch}")
        checks.check_int64("ids", ids, (batch,), key, "key")
        known = torch.full((batch,), _UNKNOWN, device=key.device) if ids is None else ids.where(ids >= 0, _UNKNOWN)
        slots = (self.position + torch.arange(batch, device=key.device)) % size
        self.memory.index_copy_(1, slots, key)
        self.memory_ids.index_copy_(0, slots, known)
        self.position.add_(batch).remainder_(size)

    def extra_repr(self) -> str:
        V, K, D = self.memory.shape
        return f"size={K}, feature_dim={D}, num_views={V}, views={self.views}, keep={self.keep}"

    def _with_views(self, name: str, features: Tensor) -> Tensor:
        """Returns features as [V, B, D] in the dtype of the queue."""
        V, _, D = self.memory.shape
        if not isinstance(features, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor [V={V}, B, D={D}], got {checks.describe(features)}")
        checks.check_dense(name, features)
        if features.dim() == 2 and V == 1:
            features = features[None]
        if features.dim() != 3 or features.shape[0] != V or features.shape[2] != D or features.shape[1] == 0:
            raise ValueError(f"{name}: expected shape [V={V}, B >= 1, D={D}], got {list(features.shape)}")
        if not features.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {features.dtype}")
        checks.check_same_device(name, features, self.memory, "the queue")
        return features.to(self.memory.dtype)
