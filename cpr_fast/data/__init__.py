"""From videos on disk to clips: storage, decoding, indexes, optical flow, clip loading, synthetic videos.

Imports `config`, `runtime` and `ops`; models and training are unknown here.
"""
