"""One training step: Algorithm 1 of the paper, and the losses it calls.

Imports `config`, `runtime`, `ops`, `mining`, `data.clips` and `pretrain.state`; `pretrain.ledger`, `pretrain.run`
and `bench` may import it.
"""
