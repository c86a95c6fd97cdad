"""Planned clips: sampling, decoding, cropping, augmentation, and the loaders that training iterates over.

Imports `config`, `data.flow`, `data.index`, `data.storage` and `data.video`; `data.features`, `evaluate`, `pretrain`,
`doctor` and `experiments` may import it.
"""
