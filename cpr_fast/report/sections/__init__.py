"""Sections of the report's page, computed from the rows of a run folder.

Imports `report.figures`; the page and `experiments` may import it.
"""
