"""Reads frames from video files or from JPEG records in LMDB files through one interface, finds the frames that a
video shows at given times, and writes such records.

Imports `runtime`, `data.files` and `data.video`; the other packages of `data`, `evaluate`, `pretrain`, `report`,
`doctor` and `commands` may import it.
"""
