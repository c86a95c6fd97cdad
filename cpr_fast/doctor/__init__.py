"""The `doctor` command: checks of the machine and of an index, estimates, decoding parity, and the time of a step.

Imports `config`, `runtime`, `ops`, `models`, `data` and the checks of `pretrain.run`; only `commands` and `bench` may
import it.
"""
