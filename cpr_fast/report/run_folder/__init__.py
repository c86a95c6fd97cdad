"""What a run folder holds: its rows by kind, whether the run learnt anything, and the features stored for it.

Imports `data`, `runtime` and `evaluate`; only `report` may import it.
"""
