"""Reads frames from video files or from JPEG records in LMDB files through one interface, and writes such records.

Imports `data.video`; the other packages of `data` may import it.
"""
