"""Commands that prepare and run trainings (init, recipes, explain, pretrain, quickstart, reproduce), and commands that
convert the weights of networks (import-checkpoint, export).

Imports what its commands run; only `cli` may import it.
"""
