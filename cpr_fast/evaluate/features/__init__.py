"""Features of videos: windows to embeddings, the feature cache, recipes, results files.

Imports `data`, `models`, `weights`; the other rooms of `evaluate` may import it.
"""
