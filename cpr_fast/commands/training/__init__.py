"""Commands that train networks or move their weights: quickstart, pretrain, reproduce, import-checkpoint, export.

Only `cpr_fast.cli` may import it.
"""
