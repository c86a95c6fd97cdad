"""Features of videos: windows to embeddings, the feature cache, recipes, results files.

Imports `data`, `models`, `weights`; the other packages of `evaluate` may import it.
"""
