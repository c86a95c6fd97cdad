"""Planned clips: sampling, decoding, cropping, augmentation, and the loaders that training iterates over.

Imports `config`, `data.flow`, `data.index`, `data.storage`, `data.video` and `data.files`; `data.features`,
`data.clips.ahead`, `evaluate`, `pretrain`, `doctor` and `experiments` may import it.
"""
