"""Stores of features: their format, writing them, reading those of other programs, and streaming them for training.

Imports `config`, `runtime`, `data.clips`, `data.index`, `data.storage` and `data.files`; `evaluate`, `pretrain`,
`report`, `experiments`, `doctor.stores` and `commands` may import it.
"""
