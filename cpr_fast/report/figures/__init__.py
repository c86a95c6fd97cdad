"""Figures of the report as inline SVG with hover values and CSV links; film strips, contact sheets, heat maps.

Imports `runtime`, `weights`, `data` and `evaluate.retrieval`; `report` and `commands` may import it.
"""
