"""The `doctor` command: checks of the machine and of an index, estimates, decoding parity, and the time of a step.

Imports `config`, `runtime`, `ops`, `models`, `data`, the checks of `pretrain.run` and the sizes of recipes in
`experiments`; only its own part `doctor.stores`, `commands` and `bench` may import it.
"""
