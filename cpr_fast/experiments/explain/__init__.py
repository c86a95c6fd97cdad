"""What a config does, in about one page: `cpr-fast explain`. Numbers come from the functions that a run calls.

Imports `config`, `mining`, `data`, `experiments` and the checks of `pretrain.run`, but nothing that imports torch; only
`commands` may import it.
"""
