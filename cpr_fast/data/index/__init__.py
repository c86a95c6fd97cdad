"""The index of a data set: its CSV file, finding and listing videos by layout, probing them, and the report.

Imports `config`, `runtime`, `data.storage` and `data.video`; all packages above it may import it.
"""
