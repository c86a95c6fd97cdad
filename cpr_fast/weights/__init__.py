"""Model weights in files: checkpoints, import of published checkpoints, export to other formats.

Imports `config`, `models` and `runtime`; training, evaluation and commands may import it.
"""
