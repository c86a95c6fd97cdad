"""A training run: checks before it starts, the loop over cycles and epochs, metrics, checkpoints, resuming.

Imports `config`, `runtime`, `models`, `mining`, `weights`, `data`, `evaluate`, `pretrain.state`, `pretrain.step` and
`pretrain.ledger`; `doctor`, `experiments` and `commands` may import it.
"""
