"""Whole experiments from data to report: the quick start, and the tables of the paper.

May import every package except `commands`; only `commands` may import it.
"""
