"""Nearest-neighbour retrieval, its baselines, and search with a user's own videos.

Imports `evaluate.features`; `pretrain`, `experiments` and `commands` may import it.
"""
