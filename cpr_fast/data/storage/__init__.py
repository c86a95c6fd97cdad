"""Where frames lie: video files, or JPEG records in LMDB files, behind one interface.

Imports `data.video`; the other rooms of `data` may import it.
"""
