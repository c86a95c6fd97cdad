"""The state of a training cycle: encoders, memory, cascade, schedule, health statistics.

Imports `models`, `mining` and `runtime`; `pretrain.step` and `pretrain.run` may import it.
"""
