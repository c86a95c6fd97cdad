"""A training run: the loop over cycles and epochs, logging, online retrieval, resuming.

Imports `pretrain.state` and `pretrain.step`; `experiments` and `commands` may import it.
"""
