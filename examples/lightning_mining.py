"""Mines with a cascade in a trainer of PyTorch Lightning: a callback gives the module its queue.

`pip install lightning && python examples/lightning_mining.py`
"""

import lightning.pytorch as lightning
import torch
from torch.nn.functional import normalize

from cpr_fast.integrations.lightning import CascadeMining
from cpr_fast.ops import QueueLoss

CLASSES, SOURCES, WIDTH, D, K = 10, 320, 64, 32, 640
lightning.seed_everything(0, verbose=False)
classes = torch.arange(SOURCES) % CLASSES  # only for the logged rate
sources = torch.randn(CLASSES, 2, WIDTH)[classes] + 1.2 * torch.randn(SOURCES, 2, WIDTH)  # [SOURCES, views, WIDTH]


class TwoViews(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.projections = torch.nn.ModuleList(torch.nn.Linear(WIDTH, D) for _ in range(2))

    def features(self, clips):
        return torch.stack([normalize(self.projections[v](clips[:, v]), dim=1) for v in range(2)])  # [views, B, D]

    def training_step(self, batch, number):
        clips, ids = batch
        query, key = (self.features(clips + 0.7 * torch.randn_like(clips)) for _ in range(2))
        loss = self.cascade(query, key, ids)  # InfoNCE until the queue is full; then with mined positives
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def on_train_epoch_end(self):
        rates = self.trainer.callback_metrics
        if self.current_epoch % 5 == 4 and "cascade_pmr" in rates:
            print(f"epoch {self.current_epoch + 1}: loss {rates['loss']:.3f}, {rates['cascade_pmr']:.0%} of the mined "
                  "are of the query's class")  # fmt: skip


queue = QueueLoss(K, D, num_views=2, views=[1, 0], keep=[60, 5])
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(sources, torch.arange(SOURCES)), 32, shuffle=True)
trainer = lightning.Trainer(max_epochs=25, callbacks=[CascadeMining(queue, labels=classes)], accelerator="cpu",
                            logger=False, enable_checkpointing=False, enable_progress_bar=False,
                            enable_model_summary=False)  # fmt: skip
trainer.fit(TwoViews(), loader)
