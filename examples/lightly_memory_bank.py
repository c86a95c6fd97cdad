"""Uses the memory bank of `lightly`: computes its NTXentLoss in one fused call, then the loss with mined positives.

`pip install lightly && python examples/lightly_memory_bank.py`
"""

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules.memory_bank import MemoryBankModule
from torch.nn.functional import normalize

from cpr_fast.ops import cascade_select, mil_nce

B, D, K = 16, 128, 4096
torch.manual_seed(0)
bank = MemoryBankModule(size=(K, D), feature_dim_first=False)
query, key = (normalize(torch.randn(B, D), dim=1) for _ in range(2))
query.requires_grad_()

theirs = NTXentLoss(temperature=0.1, memory_bank_size=(K, D))
theirs.memory_bank.bank.copy_(bank.bank)
key, memory = bank(key, update=True)  # a copy of the bank before the batch was enqueued
loss = mil_nce(query, key, memory, temperature=0.1)
print(f"lightly's loss {theirs(query, key).item():.6f}, fused {loss.item():.6f}")

# NNCLR takes the nearest neighbour as the positive; here the five nearest are positives in addition to the own key.
positives, scores = cascade_select(key[None], memory[None], views=[0], keep=[5])
loss = mil_nce(query, key, memory, positives, temperature=0.1)
loss.backward()
print(f"with 5 mined positives {loss.item():.6f}, gradient {query.grad.norm():.4f}")
