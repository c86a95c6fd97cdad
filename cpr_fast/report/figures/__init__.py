"""Pictures of the report: curves and bars as inline SVG, film strips, contact sheets, heat maps.

Imports `data` only; `report` and `commands` may import it.
"""
