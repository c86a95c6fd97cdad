"""Uses the cross-batch memory of `pytorch-metric-learning`: labels decide which of its entries are positives.

`pip install pytorch-metric-learning && python examples/metric_learning_memory.py`
"""

import torch
from pytorch_metric_learning.losses import CrossBatchMemory, SupConLoss
from torch.nn.functional import normalize

from cpr_fast.ops import cascade_select, mil_nce

CLASSES, WIDTH, D, B, K = 10, 64, 32, 32, 512
torch.manual_seed(0)
classes = torch.randn(CLASSES, WIDTH)
project = torch.nn.Linear(WIDTH, D)
optimizer = torch.optim.AdamW(project.parameters(), lr=3e-3)
memory = CrossBatchMemory(SupConLoss(), embedding_size=D, memory_size=K)  # its loss is not called: mil_nce replaces it

for step in range(60):
    labels = torch.randint(CLASSES, (B,))
    query, key = (normalize(project(classes[labels] + torch.randn(B, WIDTH)), dim=1) for _ in range(2))
    filled = K if memory.has_been_filled else memory.queue_idx
    ids = memory.label_memory.masked_fill(torch.arange(K) >= filled, -1)  # -1: empty
    loss = mil_nce(query, key, memory.embedding_memory, query_ids=labels, memory_ids=ids, same_id="positive")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    memory.add_to_memory(key.detach(), labels, B)
    if step % 20 == 19:
        nearest, _ = cascade_select(query[None], memory.embedding_memory[None], [0], [1], memory_ids=ids)
        right = (ids[nearest[:, 0]] == labels).float().mean()
        print(f"step {step + 1}: loss {loss:.3f}, the nearest entry has the query's label in {right:.0%}")
