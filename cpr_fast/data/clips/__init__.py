"""Planned clips: sampling, decoding, cropping, augmentation, and the loaders that training iterates over.

Imports `data.flow` and below; training, evaluation and the doctor may import it.
"""
