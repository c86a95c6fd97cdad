"""The motion vectors that an encoder stored in a video, as fields of motion.

Imports `data.video`; `data` and `pretrain` may import it.
"""
