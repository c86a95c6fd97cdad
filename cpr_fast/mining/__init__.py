"""Cascade mining outside of training: stage rules, quality measures (PMR, CMR), proxies, and the mining lab.

Imports `config`, `runtime` and `ops`; `integrations`, `pretrain`, `experiments` and `commands` may import it.
"""
