"""A training run: checks before it starts, the loop over cycles and epochs, metrics, checkpoints, resuming.

Imports `config`, `runtime`, `models`, `mining`, `weights`, `data`, `evaluate`, `pretrain.state` and `pretrain.step`;
`doctor`, `experiments` and `commands` may import it.
"""
