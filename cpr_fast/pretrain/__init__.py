"""Pretraining: the state of a training cycle, one training step, and whole runs.

Its packages import `config`, `runtime`, `ops`, `models`, `mining`, `weights`, `data` and `evaluate`, never `report` or
`commands`.
"""
