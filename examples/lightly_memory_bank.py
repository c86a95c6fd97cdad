"""Mines positives from the memory bank of `lightly`: its NTXentLoss, in one fused call, with mined positives.

`pip install lightly && python examples/lightly_memory_bank.py`
"""

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules.memory_bank import MemoryBankModule
from torch.nn.functional import normalize

from cpr_fast.ops import cascade_select, mil_nce

CLASSES, SOURCES, WIDTH, D, B, K = 10, 100, 64, 32, 32, 512
torch.manual_seed(0)
classes = torch.arange(SOURCES) % CLASSES  # only for the printed rate
sources = torch.randn(CLASSES, WIDTH)[classes] + 1.4 * torch.randn(SOURCES, WIDTH)
project = torch.nn.Linear(WIDTH, D)
optimizer = torch.optim.AdamW(project.parameters(), lr=3e-3)
bank = MemoryBankModule(size=(K, D), feature_dim_first=False)
held = torch.full((K,), -1)  # the source of each entry of the bank, -1 for its random vectors

for step in range(150):
    ids = torch.randint(SOURCES, (B,))
    query, key = (normalize(project(sources[ids] + 0.7 * torch.randn(B, WIDTH)), dim=1) for _ in range(2))
    slots = (bank.bank_ptr + torch.arange(B)) % K
    key, memory = bank(key.detach(), update=True)  # a copy of the bank before the batch was enqueued
    if step == 0:
        theirs = NTXentLoss(temperature=0.1, memory_bank_size=(K, D))
        theirs.memory_bank.bank.copy_(memory)
        print(
            f"lightly's loss {theirs(query, key).item():.6f}, fused {mil_nce(query, key, memory, temperature=0.1):.6f}"
        )
    # NNCLR takes the nearest neighbour as the positive; here the five nearest are positives beside the own key.
    positives, _ = cascade_select(key[None], memory[None], views=[0], keep=[5], query_ids=ids, memory_ids=held)
    loss = mil_nce(query, key, memory, positives, temperature=0.1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    held[slots] = ids
    if step % 30 == 29:
        right = (classes[held[positives]] == classes[ids][:, None]).float().mean()
        print(f"step {step + 1}: loss {loss:.3f}, {right:.0%} of the mined are of the query's class")
