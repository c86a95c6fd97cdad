"""The content of a run folder: its rows by kind, whether the run learnt anything, and its stored features.

Imports `config`, `runtime`, `data.features`, `data.index` and `evaluate`; `report` and `commands` may import
it.
"""
