"""Cascade mining and its loss in a plain PyTorch loop: projections of two views learn to distinguish sources.

`python examples/plain_torch.py`
"""

import torch
from torch.nn.functional import normalize

from cpr_fast.ops import cascade_select, mil_nce

SOURCES, WIDTH, D, B, K = 40, 64, 32, 16, 320
torch.manual_seed(0)
sources = torch.randn(2, SOURCES, WIDTH)  # what each source shows in each view
projections = torch.nn.ModuleList(torch.nn.Linear(WIDTH, D) for _ in range(2))
optimizer = torch.optim.AdamW(projections.parameters(), lr=1e-3)
memory = torch.zeros(2, K, D)
memory_ids = torch.full((K,), -1)  # -1: empty

for step in range(200):
    ids = torch.randint(SOURCES, (B,))
    clips = sources[:, ids] + 1.3 * torch.randn(2, 2, B, WIDTH)  # [augmentations, views, B, WIDTH]
    query, key = (
        torch.stack([normalize(projections[v](augmented[v]), dim=1) for v in range(2)]) for augmented in clips
    )
    key = key.detach()
    # Of the 40 entries nearest in view 1 the three nearest in view 0; empty ones are passed over.
    positives, _ = cascade_select(key, memory, views=[1, 0], keep=[40, 3], memory_ids=memory_ids)
    loss = sum(mil_nce(query[v], key[v], memory[v], positives, memory_ids=memory_ids) for v in range(2))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 40 == 39:
        right = (memory_ids[positives] == ids[:, None]).float().mean()
        print(f"step {step + 1}: loss {loss:.3f}, {right:.0%} of the mined are of the query's source")
    slots = (step * B + torch.arange(B)) % K
    memory[:, slots], memory_ids[slots] = key, ids
