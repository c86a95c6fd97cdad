"""Linear probing and finetuning of pretrained encoders.

Imports `config`, `runtime`, `ops`, `models`, `weights`, `data`, `evaluate.features` and `evaluate.retrieval`;
`experiments` and `commands` may import it.
"""
