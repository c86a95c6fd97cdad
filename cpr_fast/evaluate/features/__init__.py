"""Features of videos: windows to embeddings, the feature cache, recipes, results files.

Imports `config`, `runtime`, `models`, `weights` and `data`; the other packages of `evaluate`, `pretrain`, `report`,
`experiments` and `commands` may import it.
"""
