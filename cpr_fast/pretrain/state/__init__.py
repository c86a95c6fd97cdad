"""The state of a training cycle: encoders, memory, cascade, schedule, health statistics.

Imports `config`, `runtime`, `ops`, `models`, `mining` and `data.index`; `pretrain.step`,
`pretrain.ledger` and `pretrain.run` may import it.
"""
