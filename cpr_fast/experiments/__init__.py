"""Whole experiments from data to report: the quick start, the tables of the paper, and what a recipe does.

May import every package except `commands`; only `commands` may import it.
"""
