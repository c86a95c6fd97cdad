"""Mines with a cascade in the memory of `pytorch-metric-learning`, for one of its losses; no class label is used.

`pip install pytorch-metric-learning && python examples/metric_learning_memory.py`
"""

import torch
from pytorch_metric_learning.losses import CrossBatchMemory, SupConLoss
from torch.nn.functional import normalize

from cpr_fast.integrations.metric_learning import CascadeMiner

CLASSES, SOURCES, WIDTH, D, B, K = 10, 100, 64, 32, 32, 1024
torch.manual_seed(0)
classes = torch.arange(SOURCES) % CLASSES  # only for the printed rate
sources = torch.randn(2, CLASSES, WIDTH)[:, classes] + 1.3 * torch.randn(2, SOURCES, WIDTH)  # in each of two views
projections = torch.nn.ModuleList(torch.nn.Linear(WIDTH, D) for _ in range(2))
optimizer = torch.optim.AdamW(projections.parameters(), lr=3e-3)
# Of the 60 entries nearest in view 1 the five nearest in view 0 are positives, beside those of the same source.
miner = CascadeMiner(views=[1, 0], keep=[60, 5], num_views=2)
criterion = CrossBatchMemory(SupConLoss(), embedding_size=2 * D, memory_size=K, miner=miner)

for step in range(150):
    ids = torch.randint(SOURCES, (B,)).repeat(2)  # two augmentations of each
    clips = sources[:, ids] + 0.7 * torch.randn(2, 2 * B, WIDTH)
    embeddings = torch.cat([normalize(projections[v](clips[v]), dim=1) for v in range(2)], 1)  # the views side by side
    loss = criterion(embeddings, ids)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 30 == 29:
        slots = miner.select(embeddings, ids, criterion.embedding_memory, criterion.label_memory)
        right = (classes[criterion.label_memory[slots]] == classes[ids][:, None]).float().mean()
        print(f"step {step + 1}: loss {loss:.3f}, {right:.0%} of the mined are of the query's class")
