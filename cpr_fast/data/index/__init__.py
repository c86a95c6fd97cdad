"""The index of a data set: its CSV file, finding and listing videos by layout, probing them, and the report.

Imports `config`, `runtime`, `data.storage`, `data.video` and `data.files`; all packages above it may import it.
"""
