"""Commands that check whether runs are reproduced: verify replays a run, diff compares two.

Imports what its commands run; only `cli` may import it.
"""
