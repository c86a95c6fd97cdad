"""What a training cycle holds: encoders, memory, cascade, schedule, health statistics.

Imports `models`, `mining` and `runtime`; `pretrain.step` and `pretrain.run` may import it.
"""
