"""The content of a run folder: its rows by kind, whether the run learnt anything, and its stored features.

Imports `data`, `runtime` and `evaluate`; only `report` may import it.
"""
