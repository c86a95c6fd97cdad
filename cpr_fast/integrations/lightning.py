"""A callback for PyTorch Lightning that gives any LightningModule a queue from which positives are mined.

Letters in shapes: V views, B clips, K queue entries, D feature width, S sources.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cpr_fast.errors import InputError
from cpr_fast.mining.quality import gather_slots, judge, positive_mining_rate
from cpr_fast.ops import QueueLoss

JUDGED = 256  # newest entries of the queue whose mined positives are compared with the labels at the end of an epoch


class CascadeMining(Callback):
    """Attaches a `QueueLoss` to the module that is trained, and starts its cascade when the queue is full.

    The module calls it in its `training_step`, in place of its own loss, with unit features [V, B, D] (or [B, D] of one
    view) and the source of each clip:

        loss = self.cascade(query, key, ids)

    Until the first epoch from `start_epoch` on that begins with a full queue, nothing is mined, and the loss is
    InfoNCE. The queue is a part of the module: Lightning moves it to the device and saves it in checkpoints.

    Args:
        queue: with a cascade, which is the arguments `views` and `keep`.
        start_epoch: the first epoch, from 0, in which positives may be mined.
        name: of the attribute of the module.
        labels: [S] int64, the class of every source, -1 where unknown; `ids` count the sources from 0. With labels,
            the share of mined entries that have the query's class is logged as `NAME_pmr` at the end of every epoch
            that mines. They are used for nothing else.

    Raises:
        InputError: the queue has no cascade, the module has another attribute of this name, several processes train, of
            which each would mine in the keys of the first one, or a source in the queue has no label.
    """

    def __init__(
        self, queue: QueueLoss, *, start_epoch: int = 0, name: str = "cascade", labels: Tensor | None = None
    ) -> None:
        if not isinstance(queue, QueueLoss) or queue.views is None:
            raise InputError(
                "queue: expected a QueueLoss with a cascade (views and keep), got "
                f"{'one without' if isinstance(queue, QueueLoss) else type(queue).__name__}"
            )
        if isinstance(start_epoch, bool) or not isinstance(start_epoch, int) or start_epoch < 0:
            raise InputError(f"start_epoch: expected a number of epochs, 0 or more, got {start_epoch!r}")
        if not isinstance(name, str) or not name.isidentifier():
            raise InputError(f"name: expected the name of an attribute, got {name!r}")
        if labels is not None and not isinstance(labels, Tensor):
            raise InputError(f"labels: expected a tensor [S] of torch.int64, got {type(labels).__name__}")
        if labels is not None and (labels.dim() != 1 or labels.dtype != torch.int64):
            raise InputError(f"labels: expected [S] of torch.int64, got {list(labels.shape)} of {labels.dtype}")
        self.queue, self.start_epoch, self.name, self.labels = queue, start_epoch, name, labels
        self._cascade = queue.views, queue.keep

    @property
    def mines(self) -> bool:
        """Whether the loss has mined positives in the present epoch."""
        return self.queue.views is not None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            raise InputError(
                f"CascadeMining: expected one process, got {trainer.world_size}, of which each would mine in the keys "
                "of the first; gather the keys in training_step, and call a QueueLoss of your own"
            )
        if getattr(pl_module, self.name, self.queue) is not self.queue:
            raise InputError(
                f"name: {type(pl_module).__name__} has an attribute {self.name!r} already; choose another name"
            )
        setattr(pl_module, self.name, self.queue)  # before Lightning loads a checkpoint, which holds the queue

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        full = bool((self.queue.memory_ids != -1).all())  # waits for the device, once per epoch
        mines = full and trainer.current_epoch >= self.start_epoch
        self.queue.views, self.queue.keep = self._cascade if mines else (None, None)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.labels is not None and self.mines:
            pl_module.log(f"{self.name}_pmr", self._mining_rate())

    def state_dict(self) -> dict[str, Any]:
        """Returns whether the epoch mines, for a checkpoint in the middle of one."""
        return {"mines": self.mines}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.queue.views, self.queue.keep = self._cascade if state_dict["mines"] else (None, None)

    def _mining_rate(self) -> Tensor:
        """Returns the mean PMR [CPR, Eq. 3] of the newest entries of the queue, [] float32."""
        size = self.queue.memory.shape[1]
        newest = (self.queue.position - 1 - torch.arange(min(JUDGED, size), device=self.queue.memory.device)) % size
        ids = self.queue.memory_ids
        mined = self.queue.mine(self.queue.memory[:, newest], ids[newest])
        labels = self.labels.to(ids.device)
        if (largest := int(ids.max())) >= len(labels):
            raise InputError(f"labels: expected one of each source, got {len(labels)} and the source {largest}")
        of_entries = torch.where(ids >= 0, labels[ids.clamp(min=0)], -1)
        return positive_mining_rate(*judge(gather_slots(of_entries, mined), of_entries[newest])).nanmean()
