"""Figures of the report as inline SVG with hover values and CSV links; film strips, contact sheets, heat maps.

Imports `data` and `weights`; `report` and `commands` may import it.
"""
