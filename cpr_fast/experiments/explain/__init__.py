"""What a config does, in about one page: `cpr-fast explain`. Numbers come from the functions that a run calls.

Imports `config`, `data`, `mining` and `pretrain.run.checks`, but nothing that imports torch.
"""
