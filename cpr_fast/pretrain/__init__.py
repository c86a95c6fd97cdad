"""Pretraining: the state of a training cycle, one training step, and whole runs.

Imports `data`, `models`, `weights`, `mining` and `evaluate`; never `report` or `commands`.
"""
