"""Whole experiments from data to report: recipes sized to a data set, the quick start, the tables of the paper, and
what a recipe does.

May import every package except `doctor` and `commands`, which may import it.
"""
