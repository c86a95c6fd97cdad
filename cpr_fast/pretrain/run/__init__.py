"""A training run: checks before it starts, the loop over cycles and epochs, metrics, checkpoints, resuming.

Imports `pretrain.state` and `pretrain.step`; `experiments` and `commands` may import it.
"""
