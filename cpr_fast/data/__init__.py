"""From videos on disk to clips: storage, decoding, indexes, optical flow, clip loading, synthetic videos.

Imports `config`, `runtime` and `ops`; it must not import models or training.
"""
