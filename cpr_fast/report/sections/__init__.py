"""Sections of the report's page, computed from the rows of run folders: numbers, tables, figures and sheets of clips.

Imports `config`, `runtime`, `data.index`, `data.storage`, `evaluate`, `report.figures` and `report.run_folder`;
`report` and `experiments` may import it.
"""
