"""A miner for pytorch-metric-learning that selects positives by a cascade, within a batch or in its CrossBatchMemory.

Letters in shapes: B embeddings, K reference embeddings, V views, D feature width, P positives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor
from torch.nn.functional import normalize

from cpr_fast.errors import InputError
from cpr_fast.ops import cascade_select


class CascadeMiner(BaseMiner):
    """Positives are the references of the same source and those that a cascade selects; negatives are all others.

    The labels that the miner gets are sources: clips of one video, or augmentations of one image, have the same. Class
    labels are not needed. An embedding holds the features of all views, side by side, as in [B, V * D] of
    `torch.cat([rgb, flow], 1)`; each view's part is compared by cosine similarity. A loss that compares whole
    embeddings by cosine similarity then takes the mean over the views, if the features are unit vectors.

    Args:
        views, keep: the cascade, see `cpr_fast.ops.cascade_select`; by default the 5 most similar references in the
            only view.
        num_views: V.
        kwargs: those of `BaseMiner`.

    Returns, when called: indices (anchors, positives, anchors, negatives), as every miner of pairs.

    Raises:
        InputError: the cascade is not one of V views, the width of the embeddings is no multiple of V, or the labels
            are not integers.

    Example:
        >>> from pytorch_metric_learning.losses import CrossBatchMemory, NTXentLoss
        >>> miner = CascadeMiner(views=[1, 0], keep=[100, 5], num_views=2)
        >>> loss = CrossBatchMemory(NTXentLoss(), embedding_size=2 * 64, memory_size=1024, miner=miner)
    """

    def __init__(
        self, views: Sequence[int] = (0,), keep: Sequence[int] = (5,), *, num_views: int = 1, **kwargs: object
    ) -> None:
        super().__init__(**kwargs)
        if isinstance(num_views, bool) or not isinstance(num_views, int) or num_views < 1:
            raise InputError(f"num_views: expected a number, 1 or more, got {num_views!r}")
        try:
            cascade_select(*(torch.empty(num_views, 1, 1, device="meta") for _ in range(2)), views, keep)
        except (TypeError, ValueError) as error:
            raise InputError(f"CascadeMiner: {error}") from None
        self.views, self.keep, self.num_views = tuple(views), tuple(keep), num_views

    def mine(
        self,
        embeddings: Tensor,  # [B, V * D]
        labels: Tensor,  # [B]
        ref_emb: Tensor,  # [K, V * D]
        ref_labels: Tensor,  # [K]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        positive = labels[:, None] == ref_labels  # [B, K]
        mined = self.select(embeddings, labels, ref_emb, ref_labels)
        columns = torch.cat([positive, positive.new_zeros(len(positive), 1)], 1)  # the last one is for the padding
        positive = columns.scatter(1, mined.where(mined >= 0, len(ref_labels)), True)[:, :-1]
        compared = torch.ones_like(positive)
        if ref_emb is embeddings:  # an embedding is not compared with itself
            compared.fill_diagonal_(False)
        return *torch.where(positive & compared), *torch.where(~positive & compared)

    @torch.no_grad()
    def select(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Tensor:
        """Returns the references that the cascade selects for each embedding, [B, P] int64, -1 for none."""
        if labels.is_floating_point() or ref_labels.is_floating_point():  # two sources could become one integer
            raise InputError(f"labels: expected integers, got {labels.dtype} and {ref_labels.dtype} of the references")
        queries, memory = self._by_view(embeddings), self._by_view(ref_emb)
        slots, _ = cascade_select(
            queries, memory, self.views, self.keep, query_ids=labels.long(), memory_ids=ref_labels.long()
        )
        return slots

    def _by_view(self, embeddings: Tensor) -> Tensor:
        """Returns unit features [V, N, D] of embeddings [N, V * D]."""
        if embeddings.shape[1] % self.num_views:
            raise InputError(
                f"embeddings: expected a width that is a multiple of num_views {self.num_views}, got "
                f"{list(embeddings.shape)}"
            )
        return normalize(embeddings.detach().float().unflatten(1, (self.num_views, -1)), dim=2).transpose(0, 1)
