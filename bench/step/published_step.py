"""The published training step [CPR, on CoCLR's code] in plain torch, re-implemented from what it computes.

It is the step of one process with `protocol = "coclr"`, without the rule that drops the query's own key in 90 % of the
steps. The encoders are those of this project, so that only the rest differs: the momentum update runs weight by weight,
similarities to the queue are full matrices, the cascade is a masked top-k, the softmax over [B, 1 + K] has a mask of
positives, and the host reads the loss in every step.

Letters: B clips, K queue slots, D feature width.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cpr_fast.models import Encoder


class PublishedStep:
    """Holds encoders, queue and optimiser; a call computes one step.

    Args:
        query, other: the encoder of the view that learns, and the frozen encoder of the other view.
        features: [2, K, D], the features of a full queue, with the query's view first.
        source: [K] int64, source ids of the queue.
        views, keep: the stages of the cascade; empty for InfoNCE, which has no second view.
    """

    def __init__(
        self, query: Encoder, other: Encoder, features: Tensor, source: Tensor, views: tuple[int, ...],
        keep: tuple[int, ...], lr: float = 1e-3,
    ) -> None:  # fmt: skip
        self.query, self.key, self.other = query.train(), copy.deepcopy(query).train(), other.eval()
        for frozen in (self.key, self.other):
            frozen.requires_grad_(False)
        self.queue = features.transpose(1, 2).contiguous()  # [2, D, K], the published layout
        self.source, self.views, self.keep, self.pointer = source.clone(), views, keep, 0
        self.optimizer = torch.optim.Adam(query.parameters(), lr, weight_decay=1e-5)
        self.temperature, self.momentum = 0.07, 0.999

    def __call__(self, clips: dict[str, Tensor], source: Tensor) -> float:
        """clips: {"rgb", "flow"}: [B, 2, 3, T, H, W]; source [B] int64. Returns the loss."""
        q = self.query(clips["rgb"][:, 0])  # [B, D]
        with torch.no_grad():
            for mine, theirs in zip(self.key.parameters(), self.query.parameters(), strict=True):
                mine.data = mine.data * self.momentum + theirs.data * (1 - self.momentum)
            order = torch.randperm(len(q), device=q.device)  # "shuffle-BN" of one process
            k = self.key(clips["rgb"][:, 1][order])[order.argsort()]
            other = self.other(clips["flow"][:, 1]) if self.keep else None
        positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", q, self.queue[0].clone().detach())
        logits = torch.cat([positive, negative], dim=1) / self.temperature  # [B, 1 + K]
        same_source = source.unsqueeze(1) == self.source.unsqueeze(0)  # [B, K]
        mask = same_source.clone()
        if self.keep:
            mask |= self._mined(q.detach(), other, same_source)
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
        loss = -torch.log((nn.functional.softmax(logits, dim=1) * mask).sum(1)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._enqueue(k, k if other is None else other, source)
        logits.detach().topk(5, dim=1)  # the published code prints this accuracy
        return loss.item()

    def _mined(self, own: Tensor, other: Tensor, same_source: Tensor) -> Tensor:
        """Returns which entries survive the last stage, [B, K] bool."""
        scores = [own @ self.queue[0].clone(), other @ self.queue[1].clone()]
        left = ~same_source
        for view, count in zip(self.views, self.keep, strict=True):
            chosen = scores[view].masked_fill(~left, -torch.inf).topk(count, dim=1).indices
            left = torch.zeros_like(left).scatter_(1, chosen, True) & left
        return left

    def _enqueue(self, own: Tensor, other: Tensor, source: Tensor) -> None:
        end = self.pointer + len(own)
        self.queue[0, :, self.pointer : end] = own.T
        self.queue[1, :, self.pointer : end] = other.T
        self.source[self.pointer : end] = source
        self.pointer = end % len(self.source)
