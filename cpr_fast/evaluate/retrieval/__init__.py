"""Nearest-neighbour retrieval, its baselines, and search with a user's own videos.

Imports `config`, `runtime`, `models`, `weights`, `data` and `evaluate.features`; `evaluate.classify`,
`evaluate.duplicates`, `pretrain`, `report`, `experiments` and `commands` may import it.
"""
