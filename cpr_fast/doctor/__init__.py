"""Checks of the installation and of a data set, decoding parity, and where the time of a step goes.

Imports `data`, `models` and `ops`; only `commands` and `bench` may import it.
"""
