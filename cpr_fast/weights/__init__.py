"""Model weights in files: checkpoints, import of published checkpoints, export to other formats.

Imports `config`, `models` and `runtime`; `evaluate`, `pretrain`, `report.figures`, `experiments` and `commands` may
import it.
"""
