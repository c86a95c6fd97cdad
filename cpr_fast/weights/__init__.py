"""Model weights in files: checkpoints, import of published checkpoints, export to other formats.

Imports `config`, `runtime` and `models`; `evaluate`, `pretrain`, `experiments` and `commands` may import it.
"""
