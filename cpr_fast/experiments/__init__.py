"""Whole experiments from data to report: the quick start, and the tables of the paper.

Imports every room but `commands`, which alone may import it.
"""
