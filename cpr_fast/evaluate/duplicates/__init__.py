"""Near-duplicates and clips of one source, found by the similarity of features: the graph of nearest neighbours, the
groups that it gives, and what they say of an index.

Imports `config`, `runtime`, `ops`, `weights`, `data` and `evaluate.features`, and `evaluate.retrieval` for how views
are compared together; `report` and `commands` may import it.
"""
