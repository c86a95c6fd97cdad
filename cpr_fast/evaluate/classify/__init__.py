"""Linear probing and finetuning of pretrained encoders.

Imports `evaluate.features`; `experiments` and `commands` may import it.
"""
