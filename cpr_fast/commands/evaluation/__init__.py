"""Commands that evaluate trained networks: retrieve, probe, finetune, search, mine, compare, report.

Imports what its commands run; only `cli` and `commands.training` may import it.
"""
