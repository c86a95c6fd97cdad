"""The motion vectors that an encoder stored in a video, as fields of motion.

Imports `data.video`; `data` may import it.
"""
