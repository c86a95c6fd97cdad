"""One training step: Algorithm 1 of the paper, and the losses it calls.

Imports `pretrain.state`; `pretrain.run` may import it.
"""
