"""The rows of an index: one video, and the columns of a large index in Parquet.

Imports `config`, `data.index`, `data.storage` and `data.files`; `data` and `commands` may import it.
"""
