"""Checks of a store of features: its files, dimensions and values, and whether it holds the videos of an index.

Imports `runtime`, `data` and the findings of `doctor`; only `doctor` may import it.
"""
