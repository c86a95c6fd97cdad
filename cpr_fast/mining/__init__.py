"""Cascade mining outside of training: stage rules, quality measures (PMR, CMR), proxies, and the mining lab.

Imports `ops`, `config` and `runtime`; training, evaluation and reports may import it.
"""
